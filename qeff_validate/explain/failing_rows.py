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


def row_errors(reference: Array, actual: Array) -> Any:
    """Return the relative L2 error of each row, float64; 0 where the reference is zero, infinity where it is NaN."""
    with np.errstate(all="ignore"):
        flat = [array.reshape(len(array), -1).astype(np.float64) for array in (reference, actual)]
        errors = np.linalg.norm(flat[1] - flat[0], axis=1) / np.linalg.norm(flat[0], axis=1)
    errors[np.linalg.norm(flat[0], axis=1) == 0] = 0
    return np.where(np.isnan(errors), np.inf, errors)


def choose_rows(context: ExplainContext, reference: Array, actual: Array) -> tuple[int, list[int]]:
    """Return the row with the greatest error, and its text with a few others."""
    order = np.argsort(row_errors(reference, actual), kind="stable")
    row, ids = int(order[-1]), context.pipeline.inputs().ids
    if not isinstance(context.model, Explained):
        return row, list(range(len(ids)))
    texts = [text_of_row(context, row)]
    for other in map(int, order):
        candidate = text_of_row(context, other)
        sizes = {ids[known].size for known in texts}
        if (
            len(texts) <= HEALTHY_ROWS
            and candidate not in texts
            and ids[candidate].size
            and ids[candidate].size not in sizes
        ):
            texts.append(candidate)
    return row, texts[::-1]  # not the first of its batch, whose place is special in some faults


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
