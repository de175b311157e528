# SPDX-License-Identifier: Apache-2.0
"""Whether a row without a token, as it fills a batch, reaches the rows beside it. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qeff_validate.models.token_rows import TokenRows
from qeff_validate.tensors import Array, Tensors

Infer = Callable[[TokenRows], Tensors]
"""Runs rows that fit into one batch, and returns outputs by name, ``[rows, …]``."""


def rows_reached(infer: Infer, inputs: TokenRows, size: int, actual: Tensors) -> tuple[Sequence[int], Sequence[str]]:
    """Run each batch that has a token-less row once more with a real row in its place, and compare the others bitwise.

    If they differ, the batch runs a third time, with another real row there: rows that differ then as well depend on
    all their neighbours (as with scales that are computed over a whole batch), and not on the token-less row.

    Args:
        infer: runs one batch; the shapes are the same each time, because the rows are as long as before.
        inputs: all rows.
        size: rows of a batch.
        actual: outputs of all rows.

    Returns:
        The rows that only the token-less row changes, and findings.
    """
    reached: list[int] = []
    mixed: list[int] = []
    for start in range(0, len(inputs.ids), size):
        batch = range(start, min(start + size, len(inputs.ids)))
        real = [row for row in batch if inputs.ids[row].size]
        if not real or len(real) == len(batch):
            continue
        before = {name: array[real] for name, array in actual.items()}
        first = _with(infer, inputs, batch, inputs.ids[real[0]])
        changed = _differing(before, first)
        if not changed.any():
            continue
        others = [inputs.ids[row] for row in real if not np.array_equal(inputs.ids[row], inputs.ids[real[0]])]
        neighbours = _differing(first, _with(infer, inputs, batch, others[0])) if others else np.zeros_like(changed)
        reached += np.array(real)[changed & ~neighbours].tolist()
        mixed += np.array(real)[changed & neighbours].tolist()
    if not mixed:
        return reached, ()
    text = f"{len(mixed)} rows depend on the other rows of their batch, whichever these are"
    return reached, (f"{text} (row {mixed[0]}: {inputs.texts[mixed[0]]!r}), as with scales of a whole batch",)


def _with(infer: Infer, inputs: TokenRows, batch: range, row: Array) -> Tensors:
    """Return the outputs of a batch's real rows when its token-less places hold a given row."""
    ids = tuple(inputs.ids[at] if inputs.ids[at].size else row for at in batch)
    outputs = infer(replace(inputs, ids=ids, texts=tuple(inputs.texts[at] for at in batch)))
    real = [place for place, at in enumerate(batch) if inputs.ids[at].size]
    return {name: array[real] for name, array in outputs.items()}


def _differing(one: Tensors, other: Tensors) -> NDArray[np.bool_]:
    """Return for each row whether any output differs, bool ``[rows]``; NaN equals NaN."""
    equal = [
        ((one[name] == other[name]) | (np.isnan(one[name]) & np.isnan(other[name]))).reshape(len(one[name]), -1).all(1)
        for name in one
    ]
    differing: NDArray[np.bool_] = ~np.logical_and.reduce(equal)
    return differing
