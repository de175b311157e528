# SPDX-License-Identifier: Apache-2.0
"""Errors of scores ``[rows, labels]``: their size, and the order that they give to documents and labels.

Computed in float64; NaN is propagated. This module knows no bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.vector_metrics import Floats, overtaken, worst_row
from qeff_validate.tensors import Array


def score_errors(reference: Array, actual: Array) -> Floats:
    """Return the greatest error of each row in the unit of the scores, float64 ``[rows]``."""
    with np.errstate(all="ignore"):
        errors: Floats = np.abs(actual.astype(np.float64) - reference.astype(np.float64)).max(axis=1)
    return errors


def scale_of(reference: Array) -> float:
    """Return the root mean square of all scores."""
    return float(np.sqrt(np.mean(np.square(reference.astype(np.float64)))))


def order_metrics(reference: Array, actual: Array, groups: Sequence[int], gap: float) -> Iterator[Metric]:
    """Yield what changes places: documents of one query under each label, and labels of one row.

    Two scores that are closer than ``gap`` in the reference are tied: they may change places.

    Args:
        reference: float ``[rows, labels]``.
        actual: of the same shape.
        groups: the number of each row's query; empty: rows are not ranked against each other.
        gap: the greatest difference of two scores that noise can close.

    Yields:
        ``document_order`` if there are groups; ``label_order``, ``label_flips`` and ``label_tie_flips`` (rows whose
        greatest label changes beyond a tie, and within one) if there are several labels.
    """
    wanted, got = reference.astype(np.float64), actual.astype(np.float64)
    if groups:
        queries = np.asarray(groups)
        changes = np.zeros(len(wanted))
        for query in np.unique(queries):
            rows = np.flatnonzero(queries == query)
            changes[rows[0]] = sum(overtaken(wanted[rows, at], got[rows, at], gap) for at in range(wanted.shape[1]))
        yield _counted("document_order", changes, gap)
    if wanted.shape[1] < 2:
        return
    changes = np.array([overtaken(*scores, gap) for scores in zip(wanted, got, strict=True)], dtype=np.float64)
    yield _counted("label_order", changes, gap)
    best, now = wanted.argmax(axis=1), got.argmax(axis=1)
    rows = np.arange(len(wanted))
    tied = wanted[rows, best] - wanted[rows, now] <= gap
    yield _counted("label_flips", np.where((best != now) & ~tied, 1.0, 0.0), gap)
    yield _counted("label_tie_flips", np.where((best != now) & tied, 1.0, 0.0), gap)


def _counted(name: str, counts: Floats, gap: float) -> Metric:
    worst = worst_row(name, counts)
    return Metric(name, float(counts.sum()), {**worst.worst, "gap": gap})
