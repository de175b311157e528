# SPDX-License-Identifier: Apache-2.0
"""What a block computes in place of a linear layer: another weight, another rounding, or columns of its output.

A compiled program shows no weights. Its layer's inputs and outputs are known, though: a hypothesis about the weight is
computed from the inputs, and what befell single rows of it stands in single columns of the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qeff_validate.explain.vectors import factor_text, vector_hypotheses
from qeff_validate.models.emulation.microscaling import E2M3, in_blocks

HALVES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The coarser first: few numbers of the other are on its grid."""

COARSE = 1e-4
"""Tolerance from which values are expected to be on the grid of half precision anyway."""

FEW_COLUMNS = 0.1
"""Part of the columns of a value that are told by number, and of the greatest error below which others are equal."""

MOSTLY = 0.3
"""Part of a difference that may be left when a row or column of a weight explains it."""

MOST_PAIRS = 1 << 24
"""Pairs of columns above which none is looked for among all others."""

SHOWN = 4
"""Columns that are told by number."""

Size = Callable[[Any, Any], float]


def is_linear(module: Any) -> bool:
    """Return True for a product with a weight."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def weight_of(module: Any) -> Tensor:
    """Return the weight of a linear layer, ``[in, out]``."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, nn.Linear) else weight


def linear_hypotheses(
    root: Any, path: str, module: Any, call: tuple[Any, Any], observed: Any, size: Size, tolerance: float
) -> Iterator[tuple[str, Any]]:
    """Yield what a linear layer gives with one change each, with a name of the change.

    Args:
        root: the original model, whose other layers' weights are tried.
        path: of the layer.
        module: the layer, float64.
        call: arguments of its recorded call.
        observed: what the block gives.
        size: of an error, from the expected and the actual value.
        tolerance: error up to which a hypothesis holds.
    """
    given = call[0][0] if call[0] else next(iter(call[1].values()))
    weight = weight_of(module)
    product = (given @ weight).numpy()
    bias = 0 if module.bias is None else module.bias.numpy()
    for text, other in _other_products(given, weight, product, observed - bias, size, tolerance):
        yield text, other + bias
    if module.bias is not None:
        yield from _other_biases(root, path, module, product, observed)
    yield "its output is negated", -(product + bias)
    for name, layer in _linear_layers(root, path):
        if weight_of(layer).shape == weight.shape:
            other = (given @ weight_of(layer).double()).numpy()
            yield f"weight is that of {name}", other + bias
            if layer.bias is not None and module.bias is not None:
                yield f"weight and bias are those of {name}", other + layer.bias.detach().numpy()


def _other_products(
    given: Tensor, weight: Tensor, product: Any, inner: Any, size: Size, tolerance: float
) -> Iterator[tuple[str, Any]]:
    """Yield products with another weight ``[in, out]`` or in another precision, without the bias.

    Args:
        given: the layer's input, ``[…, in]``.
        weight: the right one.
        product: of both.
        inner: the block's output without the bias.
        size: of an error.
        tolerance: error up to which a hypothesis holds.
    """
    yield "weight is zero", np.zeros_like(product)
    if weight.shape[0] == weight.shape[1]:
        yield "weight transposed", (given @ weight.T).numpy()
    yield "weight read in the other memory order", (given @ weight.reshape(weight.shape[::-1]).T).numpy()
    if inner.shape == product.shape:
        factor = _factor(product, inner)
        if abs(factor - 1) > tolerance:
            yield f"weight {factor_text(factor)}", factor * product
        yield from _rows(given.numpy(), weight.numpy(), product, inner)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        left, right = (tensor.to(dtype).double() for tensor in (given, weight))
        yield f"computed from {name} operands", (left @ right).numpy()
        if (
            tolerance < COARSE
            and inner.any()
            and size(torch.from_numpy(inner).to(dtype).double().numpy(), inner) <= tolerance
        ):
            yield f"its product is rounded to {name}", inner
    if inner.shape == product.shape and clipped(product, inner, size, tolerance):
        yield "its product is clipped", inner
    for text, coarse in _rounded(weight):
        yield f"weight rounded to {text}", (given @ coarse).numpy()


def _other_biases(root: Any, path: str, module: Any, product: Any, observed: Any) -> Iterator[tuple[str, Any]]:
    """Yield a layer's output with another bias, which is the mean of what is added to its product."""
    bias = module.bias.numpy()
    yield "no bias", product
    yield "the bias is added twice", product + 2 * bias
    if observed.shape == product.shape:
        known = np.isfinite(observed).all(axis=-1)
        mean = np.mean((observed - product)[known], axis=0)
        biases = {name: layer.bias for name, layer in _linear_layers(root, path) if layer.bias is not None}
        others = {name: other.detach().double().numpy() for name, other in biases.items() if other.shape == bias.shape}
        for text, vector in vector_hypotheses(bias, mean, others):
            yield f"bias {text}", product + vector


def _linear_layers(root: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers of a model but one."""
    return ((name, layer) for name, layer in root.named_modules() if name != path and is_linear(layer))


def _factor(expected: Any, actual: Any) -> float:
    """Return the number that one array is of the other, as far as both are finite."""
    known = np.isfinite(actual) & np.isfinite(expected)
    return float(np.vdot(expected[known], actual[known])) / max(float(np.vdot(expected[known], expected[known])), 1e-30)


def _rounded(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight ``[in, out]`` on coarser grids, each with its name; rows are those of ``[out, in]``."""
    scales: Mapping[str, Any] = {
        " by row": weight.abs().amax(0, keepdim=True),
        " by column": weight.abs().amax(1, keepdim=True),
        "": weight.abs().max(),
    }
    for bits, (word, greatest) in itertools.product((8, 4), scales.items()):
        scale = greatest.clamp(min=1e-30) / (2 ** (bits - 1) - 1)
        yield f"int{bits}{word}", (weight / scale).round() * scale
    single = weight.float()
    yield "bf16", single.bfloat16().double()
    yield "fp8", single.to(torch.float8_e4m3fn).double()
    if not weight.shape[0] % 32:
        yield "MXFP6", in_blocks(single.T.contiguous(), E2M3, -1).T.double()


def _rows(given: Any, weight: Any, product: Any, inner: Any) -> Iterator[tuple[str, Any]]:
    """Yield what befell single rows or columns of a weight, or one element of it.

    Args:
        given: the layer's input, ``[…, in]``.
        weight: ``[in, out]``.
        product: of both.
        inner: the block's output without the bias.
    """
    places, right, wrong = (values.reshape(-1, values.shape[-1]) for values in (given, product, inner))
    known = np.isfinite(wrong).all(axis=1) & np.isfinite(right).all(axis=1)
    difference = np.where(known[:, None], wrong - right, 0)
    errors = np.linalg.norm(difference, axis=0)
    rows = np.flatnonzero(errors > FEW_COLUMNS * errors.max())
    if rows.size:
        text, columns = _of_columns(right, wrong, difference, places, rows)
        changed = right.copy()
        changed[:, rows] = columns
        if np.linalg.norm((wrong - changed)[known]) <= MOSTLY * np.linalg.norm(difference):
            yield text, changed.reshape(product.shape)
    # one column of the weight: the difference is its input times one vector
    norms = np.maximum(np.linalg.norm(places[known], axis=0), 1e-30)
    shares = np.linalg.norm(places[known].T @ difference[known], axis=1) / norms
    column = int(np.argmax(shares))
    vector = places[known, column] @ difference[known] / norms[column] ** 2
    factor = 1 + float(vector @ weight[column]) / max(float(weight[column] @ weight[column]), 1e-30)
    step = np.outer(places[:, column], (factor - 1) * weight[column])
    changed = right + step
    if np.linalg.norm((difference - step)[known]) <= MOSTLY * np.linalg.norm(difference):
        yield f"weight column {column} {_told(factor)}", changed.reshape(product.shape)


def _of_columns(right: Any, wrong: Any, difference: Any, places: Any, rows: Any) -> tuple[str, Any]:
    """Return what befell some rows of a weight, and the columns of the output that explain it."""
    listed = ", ".join(map(str, rows[:SHOWN])) + (", …" if rows.size > SHOWN else "")
    name, verb = (f"row {rows[0]}", "is") if rows.size == 1 else (f"{rows.size} rows ({listed})", "are")
    expected, actual = right[:, rows], wrong[:, rows]
    sources, alike = _sources(right, actual) if rows.size * len(right.T) <= MOST_PAIRS else (rows, np.zeros(rows.size))
    if rows.size > 1 and sorted(sources) == sorted(rows) and not np.array_equal(sources, rows):
        return f"weight {name} are {'swapped' if rows.size == 2 else 'permuted'}", right[:, sources]
    factor = float(np.vdot(expected, actual)) / max(float(np.vdot(expected, expected)), 1e-30)
    scaled = factor * expected
    if rows.size > 1 or np.linalg.norm(scaled - actual) <= FEW_COLUMNS * np.linalg.norm(difference[:, rows]):
        return f"weight {name} {_told(factor, verb)}", scaled
    if sources[0] != rows[0] and alike[0] > 1 - FEW_COLUMNS**2:
        return f"weight {name} is that of row {sources[0]}", right[:, sources]
    # one element: the difference is one input times a number
    column = difference[:, rows[0]]
    shares = np.abs(places.T @ column) / np.maximum(np.linalg.norm(places, axis=0), 1e-30)
    at = int(np.argmax(shares))
    step = float(places[:, at] @ column) / max(float(places[:, at] @ places[:, at]), 1e-30)
    return f"weight element [{rows[0]}, {at}] is off by {step:+.3g}", expected + step * places[:, at : at + 1]


def _sources(right: Any, actual: Any) -> tuple[Any, Any]:
    """Return the column of the right output that each given one is most alike to, and its cosine."""
    norms = np.maximum(np.linalg.norm(right, axis=0), 1e-30)
    alike = np.abs(right.T @ actual) / norms[:, None] / np.maximum(np.linalg.norm(actual, axis=0), 1e-30)
    return np.argmax(alike, axis=0), alike.max(axis=0)


def _told(factor: float, verb: str = "is") -> str:
    """Return a factor in words."""
    return f"{verb} {factor_text(factor)}"


def clipped(expected: Any, observed: Any, size: Size, tolerance: float) -> str:
    """Return how a value is clipped; empty if it is not."""
    top = np.abs(observed).max()
    if 0 < top < 0.98 * np.abs(expected).max() and size(np.clip(expected, -top, top), observed) <= tolerance:
        return f"its output is clipped at {top:.4g}"
    rows = np.abs(observed).max(axis=-1, keepdims=True)
    smaller = (rows > 0) & (rows < 0.98 * np.abs(expected).max(axis=-1, keepdims=True))
    if smaller.any() and size(np.clip(expected, -rows, rows), observed) <= tolerance:
        return "its output is clipped, row by row"
    return ""
