# SPDX-License-Identifier: Apache-2.0
"""Errors of sparse vectors ``[rows, vocabulary]``: their strongest words, and the dot products between them.

Computed in float64; NaN is propagated. This module knows no bounds.
"""

from __future__ import annotations

import numpy as np

from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.vector_metrics import PAIR_ROWS, overtaken
from qeff_validate.tensors import Array

STRONGEST = 32
"""Number of a row's strongest words whose order counts."""


def dot_error(reference: Array, actual: Array, *, seed: int = 0) -> Metric:
    """Return the greatest change of a dot product of two rows, relative to the lengths of both.

    Args:
        reference: float ``[rows, vocabulary]``.
        actual: of the same shape.
        seed: draws the rows if there are more than `PAIR_ROWS`.
    """
    rows = np.arange(len(reference))
    if len(rows) > PAIR_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, PAIR_ROWS, replace=False))
    wanted, got = reference[rows].astype(np.float64), actual[rows].astype(np.float64)
    lengths = np.linalg.norm(wanted, axis=1)
    with np.errstate(all="ignore"):
        change = np.abs(got @ got.T - wanted @ wanted.T)
        errors = np.where(change == 0, 0.0, change / np.outer(lengths, lengths))
    row, other = np.unravel_index(int(np.argmax(errors)), errors.shape)
    return Metric("dot_error", float(errors[row, other]), {"row": int(rows[row]), "other": int(rows[other])})


def word_order(reference: Array, actual: Array, noise: float) -> tuple[Metric, Metric]:
    """Return how many of the strongest words change places, and how many stay among the strongest.

    Args:
        reference: float ``[rows, vocabulary]``.
        actual: of the same shape.
        noise: the error of a weight that is expected from rounding alone, relative to its row's root mean square.

    Returns:
        ``word_order``: words that are overtaken across a gap of more than four times the noise, and
        ``overlap_32``: the mean share of the strongest words that both have.
    """
    wanted, got = reference.astype(np.float64), actual.astype(np.float64)
    most = min(STRONGEST, wanted.shape[1])
    changes, shares = np.zeros(len(wanted)), np.zeros(len(wanted))
    for row, (before, after) in enumerate(zip(wanted, got, strict=True)):
        first, second = (np.argsort(-weights, kind="stable")[:most] for weights in (before, after))
        words = np.union1d(first, second)
        gap = 4 * noise * float(np.sqrt(np.mean(np.square(before))))
        changes[row] = overtaken(before[words], after[words], gap)
        shares[row] = len(np.intersect1d(first, second)) / most
    return (
        Metric("word_order", float(changes.sum()), {"row": int(np.argmax(changes))}),
        Metric("overlap_32", float(shares.mean()), {"row": int(np.argmin(shares))}),
    )


def zero_rows(vectors: Array) -> frozenset[int]:
    """Return the rows whose every weight is zero; their direction is undefined."""
    return frozenset(np.flatnonzero(~np.any(vectors, axis=1)).tolist())
