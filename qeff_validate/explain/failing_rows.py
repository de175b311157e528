# SPDX-License-Identifier: Apache-2.0
"""Which rows of a failing result are looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from qeff_validate.explain.context import ExplainContext
from qeff_validate.protocols import Explained
from qeff_validate.tensors import Array

HEALTHY_ROWS = 2
"""Rows without an error that are looked at beside the failing one; they let other poolings be told apart."""


NEAR_WORST = 0.1
"""Part of the greatest error of a continuation from which an earlier step is looked at in its place."""


def row_errors(reference: Array, actual: Array) -> Any:
    """Return the relative L2 error of each row, float64; 0 where the reference is zero, infinity where it is NaN."""
    with np.errstate(all="ignore"):
        flat = [array.reshape(len(array), -1).astype(np.float64) for array in (reference, actual)]
        errors = np.linalg.norm(flat[1] - flat[0], axis=1) / np.linalg.norm(flat[0], axis=1)
    errors[np.linalg.norm(flat[0], axis=1) == 0] = 0
    return np.where(np.isnan(errors), np.inf, errors)


def choose_rows(context: ExplainContext, reference: Array, actual: Array) -> tuple[int, list[int]]:
    """Return the row with the greatest error, and its text with a few others.

    Of a continuation, it is the first step with a tenth of the greatest error: later ones inherit it.
    """
    errors = row_errors(reference, actual)
    order = np.argsort(errors, kind="stable")
    row, ids = int(order[-1]), context.pipeline.inputs().ids
    if not isinstance(context.model, Explained):
        return row, list(range(len(ids)))
    steps = context.pipeline.reference().get("steps")
    if steps is not None:
        row = first_step(errors, row, steps)
    texts, beside = [text_of_row(context, row)], HEALTHY_ROWS if steps is None else 1  # a continuation has no pooling
    for other in map(int, order):
        candidate = text_of_row(context, other)
        sizes = {ids[known].size for known in texts}
        if len(texts) <= beside and candidate not in texts and ids[candidate].size and ids[candidate].size not in sizes:
            texts.append(candidate)
    return row, texts[::-1]  # not the first of its batch, whose place is special in some faults


def first_step(errors: Any, row: int, steps: Array) -> int:
    """Return the first row of a continuation whose error is near its greatest.

    Args:
        errors: of all rows.
        row: the one with the greatest error.
        steps: rows of each continuation, in order.

    Examples:
        >>> first_step(np.array([0, 9, 1e-9, 2, 3, 5.0]), 5, np.array([2, 4]))
        3
    """
    ends = np.cumsum(steps)
    end = int(ends[np.searchsorted(ends, row, side="right")])
    start = end - int(steps[np.searchsorted(ends, row, side="right")])
    own = errors[start : row + 1]
    threshold = NEAR_WORST * errors[row] if np.isfinite(errors[row]) else np.inf
    return start + int(np.flatnonzero(own >= threshold)[0])


def described(context: ExplainContext, row: int) -> str:
    """Return a row with its text, and the step of its continuation."""
    reference = context.pipeline.reference()
    label = context.labels(len(context.pipeline.actual[context.pipeline.graph().outputs[0].name]))[row]
    steps = reference.get("steps")
    if steps is None:
        return f"row {row} ({label!r})"
    ends = np.cumsum(steps)
    at = int(np.searchsorted(ends, row, side="right"))
    return f"row {row} ({label!r}, step {row - int(ends[at] - steps[at])})"


def text_of_row(context: ExplainContext, row: int) -> int:
    """Return the index of the text that a row of an output belongs to."""
    pipeline = context.pipeline
    return int(context.model.text_of_row(pipeline.inputs(), pipeline.reference(), row))


def batch_of(context: ExplainContext, text: int) -> list[int]:
    """Return the texts that are run together with one."""
    size = int(getattr(context.pipeline.options, "batch_size", 1))
    ids = context.pipeline.inputs().ids
    start = text // size * size
    return [place for place in range(start, min(start + size, len(ids))) if ids[place].size]
