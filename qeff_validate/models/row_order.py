# SPDX-License-Identifier: Apache-2.0
"""Checks that the original model's result for a row does not depend on the rows before or beside it. Numpy only.

Transformers models with ``rope_type: dynamic`` keep the longest length so far, and use it for later rows; ``longrope``
switches frequencies for a whole batch if one row is long. BigBird attends to all tokens from its first short row on.
Others keep state or draw random numbers. The result of such a model is not unique, so it is no reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import UnstableReferenceError
from qeff_validate.models.sources.embedding_tables import ROPE, SPARSE
from qeff_validate.tensors import Array

STABLE = 1e-5
"""Accepted relative L2 between two runs of one row: rounding gives less, shifted positions 1e-3 or more.

Also in float64, because tables that a model keeps from its first run may be float32.
"""


def switches(tables: Mapping[str, int]) -> Mapping[str, int]:
    """Return lengths beyond which rotary frequencies change, by ``rope_type``."""
    return {name.removeprefix(ROPE): length for name, length in tables.items() if name.startswith(ROPE)}


def refuse_frequencies_by_length(tables: Mapping[str, int], lengths: Sequence[int]) -> None:
    """Refuse rows between which a model changes its rotary frequencies, or its attention.

    Args:
        tables: from `embedding_tables.tables`.
        lengths: numbers of tokens that are read at a time, over all rows and steps.

    Raises:
        UnstableReferenceError: rows of several lengths are beyond the switch, or on both sides of it.
    """
    least, most = min(lengths), max(lengths)
    sparse = tables.get(SPARSE)
    if sparse is not None and most > sparse:
        raise UnstableReferenceError(
            f"the original model attends to blocks of tokens beyond {sparse} tokens, and to all tokens from the first"
            f" shorter text on, and here {least} to {most} tokens are read: its answers change with the order of rows,"
            f" so they are no reference. Keep rows within {sparse} tokens"
        )
    for kind, switch in switches(tables).items():
        if most > switch and (least <= switch if kind == "longrope" else least < most):
            raise UnstableReferenceError(
                f"rope_type {kind!r}: beyond {switch} positions the rotary frequencies of the original model depend on"
                f" the longest text that was read before or beside a row, and here {least} to {most} tokens are read:"
                " its answers change with the order of rows, so they are no reference. Keep rows within"
                f" {switch} tokens"
            )


def probes(lengths: Sequence[int]) -> list[int]:
    """Return the rows to run again at the end: the first, the shortest, and the longest below the maximum length.

    Args:
        lengths: tokens of each row; rows without a token are left out.
    """
    filled = [row for row, length in enumerate(lengths) if length]
    by_length = sorted(filled, key=lengths.__getitem__)
    shorter = [row for row in by_length if lengths[row] < lengths[by_length[-1]]] if filled else []
    return list(dict.fromkeys([*filled[:1], *by_length[:1], *shorter[-1:]]))


def refuse_change(first: Mapping[int, Array], again: Callable[[int], Floats | Array], labels: Sequence[str]) -> None:
    """Run rows again, and refuse a model whose results have changed.

    A change is measured in terms of the greatest of the rows, because a single score may happen to lie near 0.

    Args:
        first: earlier result of each row to run again.
        again: runs a row.
        labels: labels of all rows.

    Raises:
        UnstableReferenceError: a row differs by more than `STABLE`.
    """
    with np.errstate(all="ignore"):
        sizes = np.array([_rms(values) for values in first.values()])
        greatest = np.max(sizes, where=np.isfinite(sizes), initial=0.0)
    for row, before in first.items():
        wide, after = before.astype(np.float64), again(row).astype(np.float64)
        with np.errstate(all="ignore"):
            change = np.float64(_rms(after - wide)) / greatest
        if np.array_equal(after, wide, equal_nan=True) or change <= STABLE:
            continue
        raise UnstableReferenceError(
            f"the original model gives row {row} ({labels[row][:40]!r}) other values when it is run again after other"
            f" rows (relative L2 {change:.1e}): it keeps state from row to row or draws random numbers, so its answers"
            " change with the order of rows and are no reference"
        )


def _rms(values: Floats | Array) -> float:
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))
