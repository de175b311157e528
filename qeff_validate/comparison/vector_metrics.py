# SPDX-License-Identifier: Apache-2.0
"""Errors of output vectors against a reference: computed in float64, worst row, NaN propagated.

This module knows no bounds. NaN or infinity in the input gives NaN or infinity in the metric, never a good value,
because numpy's reductions propagate NaN where Python's ``max`` may lose it.
Formulas: validation-methods §14.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.metric import VECTOR_METRICS, ErrorsByRow, Metric, names
from qeff_validate.comparison.similarity import similarity, similarity_noise
from qeff_validate.errors import IncomparableError
from qeff_validate.tensors import Array

Floats = NDArray[np.float64]

BLOCK = 1 << 17
"""Elements converted to float64 at a time: 1 MiB per buffer, so that a pass stays in the processor's cache."""

PAIR_ROWS = 2000
"""Maximum number of rows in pairwise metrics, drawn with a fixed seed."""

GATES = names(VECTOR_METRICS)
"""Metrics of vectors that need a bound."""


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Errors of each row, float64[n].

    Attributes:
        rel_l2: ‖b−a‖ / ‖a‖.
        cosine: cosine deficit ½‖â−b̂‖², with unit rows â and b̂.
        norm_ratio: |‖b‖/‖a‖ − 1|.
        max_abs_rms: max_j |b_j−a_j| over the root mean square of a.
        mean_abs: mean_j |b_j−a_j|.
    """

    rel_l2: Floats
    cosine: Floats
    norm_ratio: Floats
    max_abs_rms: Floats
    mean_abs: Floats


def row_errors(reference: Array, actual: Array) -> RowErrors:
    """Return the errors of every row of two [n, d] arrays, computed in one pass.

    The cosine deficit is computed as (‖b−a‖² − (‖b‖−‖a‖)²) / (2‖a‖‖b‖), which equals ½‖â−b̂‖² and needs no
    normalized copies; in float64 its rounding is about 1e-16 · |r−1|, far below every bound.

    Args:
        reference: float array [n, d].
        actual: array of the same shape.

    Raises:
        IncomparableError: the shapes differ or are not two-dimensional, or the arrays are empty.
    """
    if reference.shape != actual.shape or reference.ndim != 2 or reference.size == 0:
        raise IncomparableError(
            f"row metrics need two equal, non-empty [n, d] arrays, got {reference.shape} and {actual.shape}"
        )
    n, d = reference.shape
    sums = np.zeros((5, n))
    squares_a, squares_b, squares_d, maximum, total = sums
    with np.errstate(all="ignore"):
        for rows, columns in _blocks(n, d):
            a = reference[rows, columns].astype(np.float64)
            b = actual[rows, columns].astype(np.float64)
            squares_a[rows] += _squares(a)
            squares_b[rows] += _squares(b)
            np.subtract(b, a, out=b)
            squares_d[rows] += _squares(b)
            np.abs(b, out=b)
            np.maximum(maximum[rows], b.max(axis=1), out=maximum[rows])
            total[rows] += b @ np.ones(b.shape[1])
        norm_a, norm_b = np.sqrt(squares_a), np.sqrt(squares_b)
        deficit = (squares_d - (norm_b - norm_a) ** 2) / (2 * norm_a * norm_b)
        return RowErrors(
            rel_l2=np.sqrt(squares_d) / norm_a,
            cosine=np.maximum(deficit, 0.0),
            norm_ratio=np.abs(norm_b / norm_a - 1),
            max_abs_rms=maximum / (norm_a / np.sqrt(d)),
            mean_abs=total / d,
        )


def _squares(rows: Floats) -> Floats:
    """Return the sum of the squares of each row, by products that are faster than those of `numpy.einsum`."""
    sums: Floats = np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
    return sums


def _blocks(n: int, d: int) -> Iterator[tuple[slice, slice]]:
    width = min(d, BLOCK)
    height = max(1, BLOCK // width)
    for top in range(0, n, height):
        for left in range(0, d, width):
            yield slice(top, min(top + height, n)), slice(left, min(left + width, d))


def worst_row(name: str, values: Floats) -> Metric:
    """Return the maximum of a per-row error and its row; NaN counts as the maximum."""
    if values.size == 0:
        raise IncomparableError(f"{name}: no row to measure")
    row = int(np.argmax(values))  # argmax returns the first NaN, if there is one
    return Metric(name, float(values[row]), {"row": row}, ErrorsByRow(values))


def systematic_metrics(center: Array, actual: Array) -> list[Metric]:
    """Return the systematic errors: what rows have in common, and what averages out if the error is rounding (§12.1).

    Args:
        center: [n, d], the mean of legitimate runs in the precision.
        actual: [n, d].

    Returns:
        ``mean_signed``: the maximum over columns of the absolute mean of signed errors, each row relative to its root
        mean square; ``mean_norm``: |mean of ‖b‖/‖a‖ − 1|.
    """
    wanted, got = center.astype(np.float64), actual.astype(np.float64)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(wanted, axis=1, keepdims=True)
        signed = ((got - wanted) / (norms / np.sqrt(wanted.shape[1]))).mean(axis=0)
        ratios = np.linalg.norm(got, axis=1) / norms[:, 0]
        standard_error = float(ratios.std() / np.sqrt(len(ratios)))
    column = int(np.argmax(np.abs(signed)))  # argmax returns the first NaN, if there is one
    return [
        Metric("mean_signed", float(np.abs(signed[column])), {"column": column, "rows": len(wanted)}),
        Metric("mean_norm", abs(float(ratios.mean()) - 1), {"rows": len(wanted), "standard_error": standard_error}),
    ]


def systematic_size(metric: Metric) -> float:
    """Return the systematic error of a legitimate run, at least its standard error, for the limit over all runs.

    The mean over rows deviates from zero by its standard error, so a smaller value is chance: the systematic errors of
    MiniLM with max pooling were 0.9e-5, 1.9e-5 and 2.8e-5 (root mean square of eight) with other batches and seeds.
    """
    return float(np.max([metric.value, metric.worst.get("standard_error", 0.0)]))


def neighbour_metrics(
    reference: Array, actual: Array, *, noise: float, seed: int = 0, by: str = "cosine"
) -> list[Metric]:
    """Return the order of neighbours, the overlap of the ten nearest, and the drift of their scores.

    Errors of at most ``noise`` move the score of neighbour k by at most δₖ (`similarity_noise`), so two neighbours of a
    row can swap ranks only if their reference scores differ by at most δⱼ + δₖ. Every neighbour that is overtaken
    across a greater gap is a violation.

    Args:
        reference: [n, d], n ≥ 3.
        actual: [n, d].
        noise: relative L2 error of a row that is expected from rounding alone; below the row bound, so that this
            metric detects correlated errors of rows that pass one by one.
        seed: for sampling the rows if there are more than `PAIR_ROWS`.
        by: the score, one of `similarity.SIMILARITIES`.

    Returns:
        ``neighbour_order`` (number of violations), ``overlap_10`` (1 = all), ``score_drift``.
    """
    n = len(reference)
    if n < 3:
        raise IncomparableError(f"the order of neighbours needs at least 3 rows, got {n}")
    sample = np.arange(n)
    if n > PAIR_ROWS:
        sample = np.sort(np.random.default_rng(seed).choice(n, PAIR_ROWS, replace=False))
    a, b = reference[sample].astype(np.float64), actual[sample].astype(np.float64)
    a, b = (_unit(a), _unit(b)) if by == "cosine" else (a, b)
    score = "dot" if by == "cosine" else by  # of unit rows
    k = min(10, len(sample) - 1)
    violations = np.zeros(len(sample))
    overlap = np.zeros(len(sample))
    drift = np.zeros(len(sample))
    gaps = np.zeros(len(sample))
    for i in range(len(sample)):
        others = np.delete(np.arange(len(sample)), i)
        wanted, got = similarity(score, a[i], a[others]), similarity(score, b[i], b[others])
        moved = similarity_noise(by, a[i], a[others], noise)
        gaps[i] = 2 * np.max(moved)
        violations[i] = overtaken(wanted, got, 2 * moved)
        drift[i] = np.max(np.abs(got - wanted))
        overlap[i] = len(np.intersect1d(np.argsort(-wanted)[:k], np.argsort(-got)[:k])) / k
    used = {"rows_used": len(sample), "rows": n, **({} if by == "cosine" else {"similarity": by})}
    row = int(sample[int(np.argmax(violations))])
    return [
        Metric("neighbour_order", float(violations.sum()), {"row": row, "gap": float(np.max(gaps)), **used}),
        Metric("overlap_10", float(overlap.mean()), {"row": int(sample[int(np.argmin(overlap))]), **used}),
        Metric("score_drift", float(np.max(drift)), {"row": int(sample[int(np.argmax(drift))]), **used}),
    ]


def _unit(rows: Floats) -> Floats:
    with np.errstate(all="ignore"):
        unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def overtaken(wanted: Floats, got: Floats, gap: float | Floats) -> int:
    """Count the neighbours k that ``got`` ranks at or above some j with wanted[j] > wanted[k] + gap.

    Args:
        wanted: scores of the reference, float64 ``[n]``.
        got: scores under test.
        gap: one number, or one of each neighbour: of two, noise can close the mean.
    """
    lower, upper = wanted - np.asarray(gap) / 2, wanted + np.asarray(gap) / 2
    order = np.argsort(-lower)
    lower, upper, got = lower[order], upper[order], got[order]
    lowest = np.minimum.accumulate(got)  # propagates NaN
    ahead = np.searchsorted(-lower, -upper, side="left")  # number of neighbours that are above k whatever noise does
    has_ahead = ahead > 0
    return int(np.count_nonzero(~(lowest[ahead[has_ahead] - 1] > got[has_ahead])))
