# SPDX-License-Identifier: Apache-2.0
"""Finds rows that depend on the token-less rows that fill up their batch. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qeff_validate.models.token_rows import TokenRows
from qeff_validate.tensors import Array, Tensors

Infer = Callable[[TokenRows], Tensors]
"""Runs the rows of one batch and returns outputs by name, ``[rows, …]``."""


def rows_reached(infer: Infer, inputs: TokenRows, size: int, actual: Tensors) -> tuple[Sequence[int], Sequence[str]]:
    """Run each batch that has a token-less row again with a real row in its place, and compare the other rows bitwise.

    If they differ, the batch is run a third time with another real row: rows that change again depend on all other
    rows of their batch (as with quantization scales of a whole batch), not on the token-less row.

    Args:
        infer: runs one batch; the shapes are the same each time, because the replacement row is one of the batch.
        inputs: all rows.
        size: rows per batch.
        actual: outputs of all rows.

    Returns:
        The indices of rows that only the token-less row changes, and findings.
    """
    reached: list[int] = []
    mixed: list[int] = []
    for start in range(0, len(inputs.ids), size):
        batch = range(start, min(start + size, len(inputs.ids)))
        real = [row for row in batch if inputs.ids[row].size]
        if not real or len(real) == len(batch):
            continue
        before = {name: array[real] for name, array in actual.items()}
        first = _run_with(infer, inputs, batch, inputs.ids[real[0]])
        changed = _differing(before, first)
        if not changed.any():
            continue
        others = [inputs.ids[row] for row in real if not np.array_equal(inputs.ids[row], inputs.ids[real[0]])]
        neighbours = _differing(first, _run_with(infer, inputs, batch, others[0])) if others else np.zeros_like(changed)
        reached += np.array(real)[changed & ~neighbours].tolist()
        mixed += np.array(real)[changed & neighbours].tolist()
    if not mixed:
        return reached, ()
    text = f"{len(mixed)} rows depend on the other rows of their batch, whichever these are"
    return reached, (f"{text} (row {mixed[0]}: {inputs.texts[mixed[0]]!r}), as with scales of a whole batch",)


def _run_with(infer: Infer, inputs: TokenRows, batch: range, row: Array) -> Tensors:
    """Return the outputs of the real rows of a batch with its token-less rows replaced by ``row``."""
    ids = tuple(inputs.ids[at] if inputs.ids[at].size else row for at in batch)
    outputs = infer(replace(inputs, ids=ids, texts=tuple(inputs.texts[at] for at in batch)))
    real = [place for place, at in enumerate(batch) if inputs.ids[at].size]
    return {name: array[real] for name, array in outputs.items()}


def _differing(first: Tensors, second: Tensors) -> NDArray[np.bool_]:
    """Return for each row whether any output differs, bool ``[rows]``; NaN equals NaN."""
    equal = [
        ((first[name] == second[name]) | (np.isnan(first[name]) & np.isnan(second[name])))
        .reshape(len(first[name]), -1)
        .all(1)
        for name in first
    ]
    differing: NDArray[np.bool_] = ~np.logical_and.reduce(equal)
    return differing
