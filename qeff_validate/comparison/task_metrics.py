# SPDX-License-Identifier: Apache-2.0
"""What the outputs are worth for a task: rank correlation, nDCG, and an interval for their difference to the reference.

These numbers stand beside a verdict and never decide it. NaN among scores gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.vector_metrics import Floats

RESAMPLES = 1000
"""Number of bootstrap resamples."""

CONFIDENCE = 0.95
"""Of the interval, which lies between percentiles of the resampled differences."""

CUTOFF = 10
"""Number of first documents that nDCG counts."""

LABELS: Mapping[str, str] = {"spearman": "Spearman", "ndcg_10": "nDCG@10"}
"""The measures, as people read them."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a runtime and the reference reach on task data, and an interval of the difference.

    Attributes:
        metric: ``spearman`` or ``ndcg_10``.
        data: name of the set, or of its file.
        units: what is resampled: ``pairs`` or ``queries``.
        count: number of these.
        reference: what the original model reaches.
        value: what the runtime reaches.
        low: lower end of the interval of ``value`` − ``reference``, by paired bootstrap.
        high: its upper end.
    """

    metric: str
    data: str
    units: str
    count: int
    reference: float
    value: float
    low: float
    high: float

    def plain(self) -> dict[str, Any]:
        """Return the score as report.json holds it."""
        return {
            "metric": self.metric,
            "data": self.data,
            "units": self.units,
            "count": self.count,
            "reference": self.reference,
            "value": self.value,
            "difference": self.value - self.reference,
            "interval": [self.low, self.high],
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TaskScore:
        """Return the score that `plain` describes; raises KeyError, TypeError or ValueError if it describes none."""
        metric, data, units = (str(plain[name]) for name in ("metric", "data", "units"))
        if metric not in LABELS:
            raise ValueError(f"task: metric {metric!r}")
        low, high = map(float, plain["interval"])
        return cls(
            metric, data, units, int(plain["count"]), float(plain["reference"]), float(plain["value"]), low, high
        )

    @property
    def label(self) -> str:
        """The measure as people read it."""
        return LABELS[self.metric]

    def __str__(self) -> str:
        return (
            f"{self.label} on {self.data} {self.value:.4f} (reference {self.reference:.4f}), difference"
            f" {self.value - self.reference:+.2g}, {CONFIDENCE:.0%} interval {self.low:+.2g} to {self.high:+.2g} by"
            f" paired bootstrap over {self.count} {self.units}"
        )


def spearman(scores: Floats, wanted: Floats, counts: Floats | None = None) -> float:
    """Return the rank correlation of two float64 ``[n]``; equal values share their mean rank. NaN if one is constant.

    Args:
        scores: float64 ``[n]``.
        wanted: float64 ``[n]``.
        counts: how often each place is counted; None: once.
    """
    weights = np.ones(len(scores)) if counts is None else counts
    if np.isnan(scores).any() or np.isnan(wanted).any():
        return float("nan")
    return _correlation(_ranks(*_codes(scores), weights), _ranks(*_codes(wanted), weights), weights)


def _codes(values: Floats) -> tuple[NDArray[np.intp], int]:
    """Return the place of each value among the distinct ones in order, and their number."""
    distinct, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1), len(distinct)


def _ranks(codes: NDArray[np.intp], distinct: int, counts: Floats) -> Floats:
    """Return the mean rank of each value, where it is counted so often."""
    number = np.bincount(codes, counts, distinct)
    ranks: Floats = (np.cumsum(number) - number + (number + 1) / 2)[codes]
    return ranks


def _correlation(a: Floats, b: Floats, counts: Floats) -> float:
    a, b = a - np.average(a, weights=counts), b - np.average(b, weights=counts)
    with np.errstate(all="ignore"):
        return float((counts * a * b).sum() / np.sqrt((counts * a * a).sum() * (counts * b * b).sum()))


def ndcg(scores: Floats, relevance: Floats, cutoff: int = CUTOFF) -> float:
    """Return the normalized discounted cumulative gain of one query's documents.

    The gain of a document is its relevance, the discount 1 / log2(rank + 1) (Järvelin and Kekäläinen, 2002); documents
    of equal scores share the mean of their discounts (McSherry and Najork, 2008).

    Args:
        scores: float64 ``[documents]``.
        relevance: float64 ``[documents]``, from 0; one is greater.
        cutoff: number of first documents that count.
    """
    if np.isnan(scores).any():
        return float("nan")
    discounts = np.where(np.arange(len(scores)) < cutoff, 1 / np.log2(np.arange(len(scores)) + 2), 0.0)
    _, ranked, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    shared = np.add.reduceat(discounts, ends - sizes) / sizes
    ideal = float(np.sort(relevance)[::-1] @ discounts)
    return float(relevance @ shared[ranked.reshape(-1)]) / ideal


def compare_spearman(reference: Floats, actual: Floats, wanted: Floats, data: str, seed: int) -> TaskScore:
    """Return the rank correlations of two runs' scores with the wanted ones, float64 ``[pairs]`` each."""
    finite = not (np.isnan(reference).any() or np.isnan(actual).any())
    coded = [_codes(values) for values in (reference, actual, wanted)] if finite else []

    def difference(places: NDArray[np.int64]) -> float:
        counts = np.bincount(places, minlength=len(wanted)).astype(np.float64)
        ranks = [_ranks(*codes, counts) for codes in coded]
        return _correlation(ranks[1], ranks[2], counts) - _correlation(ranks[0], ranks[2], counts)

    low, high = _interval(difference, len(wanted), seed) if finite else (np.nan, np.nan)
    before, after = spearman(reference, wanted), spearman(actual, wanted)
    return TaskScore("spearman", data, "pairs", len(wanted), before, after, low, high)


def compare_ndcg(
    reference: Sequence[Floats], actual: Sequence[Floats], relevance: Sequence[Floats], data: str, seed: int
) -> TaskScore:
    """Return the mean nDCG of two runs over queries; each gives float64 ``[documents]`` for each query."""
    by_query = np.array(
        [[ndcg(scores, wanted) for scores in runs] for *runs, wanted in zip(reference, actual, relevance, strict=True)]
    )
    changes = by_query[:, 1] - by_query[:, 0]
    low, high = _interval(lambda places: float(changes[places].mean()), len(changes), seed)
    before, after = by_query.mean(axis=0).tolist()
    return TaskScore("ndcg_10", data, "queries", len(changes), before, after, low, high)


def _interval(difference: Callable[[NDArray[np.int64]], float], count: int, seed: int) -> tuple[float, float]:
    """Return percentiles of a difference over resamples of ``count`` places (Efron's percentile interval)."""
    draw = np.random.default_rng(seed)
    values = np.array([difference(draw.integers(count, size=count)) for _ in range(RESAMPLES)])
    tail = 100 * (1 - CONFIDENCE) / 2
    if np.isnan(values).all():
        return float("nan"), float("nan")
    # a resample of pairs with one wanted score has no correlation
    low, high = np.nanpercentile(values, [tail, 100 - tail]).tolist()
    return low, high
