# SPDX-License-Identifier: Apache-2.0
"""How a block's output is made from the right one, whatever the block computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qeff_validate.explain.linear import COARSE, FEW_COLUMNS, HALVES, clipped

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "gelu": functional.gelu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "softmax": lambda values: torch.softmax(values, dim=-1),
    "tanh": torch.tanh,
}
"""Functions that a value may go through once too often."""


def output_finding(
    expected: Any, observed: Any, given: Any, size: Callable[[Any, Any], float], tolerance: float
) -> str:
    """Return how a block's output is made from the right one; empty if it is not.

    Args:
        expected: the right output.
        observed: of the same shape.
        given: the module's input, if it has the same shape, else None.
        size: of an error.
        tolerance: error up to which a hypothesis holds.
    """
    expected, observed = (np.asarray(values, dtype=np.float64) for values in (expected, observed))
    if not np.isfinite(observed).all():
        bad = ~np.isfinite(observed)
        return f"{int(bad.sum())} of {observed.size} values of its output are NaN or infinite"
    if not observed.any():
        return "its output is zero"
    if expected.min() < expected.max() and observed.min() == observed.max():
        return f"its output is {observed.flat[0]:.4g} everywhere"
    if len(observed) > 1 and (observed == observed[:1]).all() and (expected != expected[:1]).any():
        return "its output is the same for every row"
    if given is not None and given.shape == observed.shape and size(given, observed) <= tolerance:
        return "skipped: its output is its input"
    for name, grid in HALVES.items() if tolerance < COARSE else ():
        rounded = torch.from_numpy(observed).to(grid).double().numpy()
        if np.array_equal(rounded, observed) and not np.array_equal(np.rint(observed), observed):
            coarse = torch.from_numpy(expected).to(grid).double().numpy()
            if size(coarse, observed) <= max(tolerance, 2 * size(coarse, expected)):
                return f"its output is rounded to {name}"
    text = _columns(expected, observed, size, tolerance)
    if text:
        return text
    for text, made in _hypotheses(expected, observed):
        if size(made, observed) <= tolerance < size(made, expected):
            return text
    return clipped(expected, observed, size, tolerance)


def _hypotheses(expected: Any, observed: Any) -> Iterator[tuple[str, Any]]:
    """Yield what may have befallen an output, and what it is then."""
    factor = float(np.vdot(expected, observed) / np.vdot(expected, expected))
    yield f"its output is scaled by {factor:.5g}", factor * expected
    added = float(np.mean(observed - expected))
    yield f"its output has {added:.4g} added", expected + added
    order = _nearest_rows(expected, observed)
    count, moved = len(order), int(order[0])
    if np.array_equal(order, np.roll(np.arange(count), -moved)):
        yield f"rows of its output are shifted by {-moved if moved <= count // 2 else count - moved}", expected[order]
    yield "rows of its output are in another order, or other rows", expected[order]
    for step in (1, -1, expected.shape[-1] // 2):
        yield f"columns of its output are shifted by {step}", np.roll(expected, step, axis=-1)
    yield "columns of its output are in reverse order", expected[..., ::-1]
    values = torch.from_numpy(expected)
    for name, function in FUNCTIONS.items():
        yield f"its output goes through {name}", function(values).numpy()


def _nearest_rows(expected: Any, observed: Any) -> Any:
    """Return for each row of a value the index of the most similar row of the right one."""
    right, wrong = (values.reshape(len(values), -1) for values in (expected, observed))
    distances = (right**2).sum(axis=1) - 2 * wrong @ right.T
    return distances.argmin(axis=1)


def _columns(expected: Any, observed: Any, size: Callable[[Any, Any], float], tolerance: float) -> str:
    """Return which columns of a value are zero or scaled while all others are right; empty if none are."""
    right, wrong = (values.reshape(-1, values.shape[-1]) for values in (expected, observed))
    errors = np.linalg.norm(wrong - right, axis=0)
    columns = np.flatnonzero(errors > FEW_COLUMNS * errors.max())
    if not 0 < columns.size <= errors.size // 2:
        return ""
    factor = float(np.vdot(right[:, columns], wrong[:, columns]) / np.vdot(right[:, columns], right[:, columns]))
    told = right.copy()
    told[:, columns] *= factor
    if size(told.reshape(expected.shape), observed) > tolerance:
        return ""
    what = "zero" if abs(factor) < tolerance else f"scaled by {factor:.4g}"
    return f"{columns.size} of {errors.size} columns of its output, first column {columns[0]}, are {what}"
