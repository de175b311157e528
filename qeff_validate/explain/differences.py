# SPDX-License-Identifier: Apache-2.0
"""What differs between two arrays that should be equal, in words such as zero, transposed, scaled or rounded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qeff_validate.models.emulation.microscaling import E2M3, in_blocks

CLOSE = 1e-5
"""Relative L2 below which a hypothesis explains an array: float32 rounding of one operation and of its inverse."""

MOST_ELEMENTS = 1 << 24
"""Elements above which only the cheap hypotheses are tried."""

GRID = 256
"""Most magnitudes of an array that is called rounded to a grid: those of 8 bits and a sign."""

Numbers = Any


def difference(
    expected: Numbers, actual: Numbers, others: Mapping[str, Numbers] | None = None, close: float = CLOSE
) -> str:
    """Return in words how an array differs from the expected one; empty if they are equal.

    Args:
        expected: float32 or float64; of a matrix, the first axis is called rows.
        actual: of the same number of elements.
        others: arrays by name that could be there in its place.
        close: relative L2 up to which a factor explains an array.

    Examples:
        >>> weight = np.arange(12.0, dtype=np.float32).reshape(3, 4) + 1
        >>> difference(weight, np.where([[False], [True], [False]], 0, weight).astype(np.float32))
        'row 1 is zero'
        >>> difference(weight, 2 * weight)
        'scaled by 2'
    """
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape == actual.shape and np.array_equal(expected, actual, equal_nan=True):
        return ""
    for name, other in (others or {}).items():
        if other.shape == actual.shape and np.array_equal(other, actual):
            return f"is that of {name}"
    if expected.shape != actual.shape:
        if expected.ndim == 2 and expected.T.shape == actual.shape and np.array_equal(expected.T, actual):
            return "transposed"
        return f"has shape {list(actual.shape)} instead of {list(expected.shape)}"
    return next(_hypotheses(expected.astype(np.float64), actual.astype(np.float64), close))


def is_named(text: str) -> bool:
    """Return whether `difference` says what happened, and not only how much."""
    return not re.match(r"differs by |\d+ of \d+ values differ", text)


def _hypotheses(expected: Numbers, actual: Numbers, close: float) -> Iterator[str]:
    """Yield what explains the whole difference, the simplest first; at last the size of the difference."""
    bad = ~np.isfinite(actual)
    if bad.any():
        yield f"{int(bad.sum())} of {actual.size} values are NaN or infinite, first at {_place(bad)}"
    if not actual.any():
        yield "is zero"
    if expected.ndim == 2 and expected.shape[0] == expected.shape[1] and np.array_equal(expected.T, actual):
        yield "transposed"
    if expected.ndim == 2 and np.array_equal(expected.T.reshape(expected.shape), actual):
        yield "read in the other memory order"
    yield from _of_rows(expected, actual, close)
    yield from _scaled(expected, actual, close)
    yield from _moved(expected, actual)
    yield from _rounded(expected, actual)
    yield from _of_elements(expected, actual)
    yield f"differs by {_relative(expected, actual):.2g} (relative L2)"


def _of_rows(expected: Numbers, actual: Numbers, close: float) -> Iterator[str]:
    """Yield what is wrong with one row or column, or a few, while all others are equal."""
    for axis, word in ((0, "row"), (1, "column")):
        if axis >= expected.ndim:
            break
        other_axes = tuple(i for i in range(expected.ndim) if i != axis)
        wrong = np.flatnonzero((expected != actual).any(axis=other_axes))
        if not 0 < wrong.size <= max(1, expected.shape[axis] // 2) or (expected.ndim == 1 and wrong.size > 8):
            continue
        names = _listed(word, wrong)
        are = "is" if wrong.size == 1 else "are"
        left, right = (np.take(values, wrong, axis) for values in (expected, actual))
        if not right.any():
            yield f"{names} {are} zero"
        if np.array_equal(-left, right):
            yield f"{names} {are} negated"
        if wrong.size > 1:
            order = _permutation(left if axis == 0 else np.moveaxis(left, axis, 0), np.moveaxis(right, axis, 0))
            if order is not None:
                yield f"{names} are swapped" if wrong.size == 2 else f"{names} are permuted"
        if expected.ndim > 1:
            factor = _factor(left, right, close)
            if factor is not None:
                yield f"{names} {are} scaled by {factor:.4g}"
            if wrong.size <= max(1, expected.shape[axis] // 8):
                yield from _one_element(expected, actual)
                yield f"{names} {'differs' if wrong.size == 1 else 'differ'}"


def _one_element(expected: Numbers, actual: Numbers) -> Iterator[str]:
    wrong = expected != actual
    if int(wrong.sum()) <= 4:
        place = _place(wrong)
        at = tuple(np.argwhere(wrong)[0])
        count = int(wrong.sum())
        what = f"element {place} is" if count == 1 else f"{count} elements differ, first at {place}:"
        yield f"{what} {actual[at]:.4g} instead of {expected[at]:.4g}"


def _of_elements(expected: Numbers, actual: Numbers) -> Iterator[str]:
    yield from _one_element(expected, actual)
    wrong = expected != actual
    offset = actual - expected
    if np.abs(offset - offset.mean()).max() <= CLOSE * max(np.abs(expected).max(), 1e-30):
        yield f"{offset.mean():+.4g} is added"
    limit = np.abs(actual).max()
    clipped = np.clip(expected, -limit, limit)
    if wrong.any() and np.array_equal(clipped, actual):
        yield f"clipped at {limit:.4g}"
    share = wrong.mean()
    if share < 0.5:
        yield f"{int(wrong.sum())} of {wrong.size} values differ, by {_relative(expected, actual):.2g} (relative L2)"


def _scaled(expected: Numbers, actual: Numbers, close: float) -> Iterator[str]:
    if np.array_equal(-expected, actual):
        yield "negated"
    factor = _factor(expected, actual, close)
    if factor is not None:
        yield f"scaled by {factor:.6g}"
    if expected.ndim == 1 and np.ptp(actual) == 0:
        yield f"is {actual.flat[0]:.4g} everywhere"
    if expected.ndim == 1 and expected.size > 2 and (expected > 0).all() and (actual > 0).all():
        steps = np.diff(np.log(actual / expected))
        if np.abs(steps).max() > CLOSE and np.ptp(steps) < 1e-3 * np.abs(steps).max():
            yield "has another base: the ratio to the right value falls or rises with the index"


def _moved(expected: Numbers, actual: Numbers) -> Iterator[str]:
    for axis, word in ((0, "rows"), (expected.ndim - 1, "columns")):
        if axis == 0 and word == "columns":
            break
        for step in (1, -1, 2, -2):
            if np.array_equal(np.roll(expected, step, axis), actual):
                yield f"{word} are shifted by {step}"
        order = _permutation(np.moveaxis(expected, axis, 0), np.moveaxis(actual, axis, 0))
        if order is not None:
            yield f"{word} are permuted"


def _rounded(expected: Numbers, actual: Numbers) -> Iterator[str]:
    if expected.size > MOST_ELEMENTS:
        return
    values = torch.from_numpy(np.ascontiguousarray(expected, dtype=np.float32))
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        if np.array_equal(values.to(dtype).float().numpy(), actual.astype(np.float32)):
            yield f"rounded to {name}"
    if expected.ndim > 1:
        yield from _in_integers(expected, actual)
        yield from _compressed(values, actual)
    grid = np.unique(np.abs(actual)).size
    if grid <= GRID < np.unique(np.abs(expected)).size:
        yield f"rounded to a grid of {grid} magnitudes"


def _in_integers(expected: Numbers, actual: Numbers) -> Iterator[str]:
    """Yield integers with a scale for each row, for each column, or for all."""
    words = {(-1,): " by row", (0,): " by column", None: ""}
    for bits, (axes, word) in itertools.product((8, 4), words.items()):
        top = 2 ** (bits - 1) - 1
        for levels in (top, top + 0.5):
            scale = np.abs(expected).max(axis=axes, keepdims=True) / levels
            scale = np.where(scale == 0, 1, scale)
            steps = actual / scale
            on_grid = np.abs(steps - np.rint(steps)).max() < 2e-2
            if on_grid and np.abs(expected - actual).max() <= 0.51 * scale.max():
                yield f"rounded to int{bits}{word}"


def _compressed(values: Any, actual: Numbers) -> Iterator[str]:
    """Yield MXFP6, with blocks along either axis."""
    for axis in range(values.ndim):
        blocks = _in_blocks(values, axis)
        if blocks is not None and np.array_equal(blocks, actual.astype(np.float32)):
            yield "rounded to MXFP6"


def _in_blocks(values: Any, axis: int) -> Numbers | None:
    try:
        return in_blocks(values, E2M3, axis).numpy()
    except (RuntimeError, ValueError, AssertionError):
        return None


def _factor(expected: Numbers, actual: Numbers, close: float) -> float | None:
    """Return the number that one array is of the other; None if it is none."""
    norm = float(np.vdot(expected, expected))
    if not norm:
        return None
    factor = float(np.vdot(expected, actual)) / norm
    return factor if factor and _relative(factor * expected, actual) < close else None


def _permutation(expected: Numbers, actual: Numbers) -> Sequence[int] | None:
    """Return the order of the first axis that turns one array into the other; None if there is none."""
    if expected.shape != actual.shape or len(expected) < 2:
        return None
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(expected):
        places.setdefault(np.ascontiguousarray(row).tobytes(), []).append(index)
    order = []
    for row in actual:
        found = places.get(np.ascontiguousarray(row).tobytes())
        if not found:
            return None
        order.append(found.pop(0))
    return order if order != list(range(len(order))) else None


def _relative(expected: Numbers, actual: Numbers) -> float:
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(expected - actual)) / norm if norm else float("inf")


def _listed(word: str, indices: Any) -> str:
    if indices.size == 1:
        return f"{word} {indices[0]}"
    shown = ", ".join(map(str, indices[:4]))
    return f"{indices.size} {word}s ({shown}{', …' if indices.size > 4 else ''})"


def _place(where: Any) -> str:
    return str([int(index) for index in np.argwhere(where)[0]])
