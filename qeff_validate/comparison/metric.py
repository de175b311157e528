# SPDX-License-Identifier: Apache-2.0
"""All metrics that verdicts gate, in one table: meaning, bounds by precision, and limits of measured and own bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_ROW_ERRORS = 200
"""Maximum number of errors by row that a report keeps of one metric."""


@dataclass(frozen=True, slots=True)
class ErrorsByRow:
    """The errors of an output's rows, in order.

    Attributes:
        values: one for each row or, if `rows_each` is not 1, the greatest of as many consecutive rows; NaN: none of
            these rows was measured, because it is not finite or holds no token.
        rows_each: number of rows that one value stands for.
    """

    values: Sequence[float] | NDArray[np.float64]
    rows_each: int = 1

    @classmethod
    def of(cls, errors: Sequence[float] | NDArray[np.float64], places: Sequence[int], rows: int) -> ErrorsByRow:
        """Return the errors of an output with a number of rows, of which those at ``places`` were measured."""
        values = np.full(rows, np.nan)
        values[list(places)] = errors
        return cls(values).bounded()

    def bounded(self) -> ErrorsByRow:
        """Return at most `MOST_ROW_ERRORS` values."""
        values, joined = np.asarray(self.values, np.float64), max(1, -(-len(self.values) // MOST_ROW_ERRORS))
        if joined > 1:
            values = np.fmax.reduceat(values, np.arange(0, len(values), joined))  # NaN where no row was measured
        return ErrorsByRow(tuple(values.tolist()), joined * self.rows_each)


LABELS: Mapping[str, str] = {"cosine": "1-cosine", "delta_cosine": "1-delta_cosine"}
"""Names of metrics as people read them, where they differ from those in configs and report.json."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One measurement: its name, its worst value, and the position of the worst value."""

    name: str
    value: float
    worst: Mapping[str, Any] = field(default_factory=dict)
    by_row: ErrorsByRow | None = field(default=None, compare=False, repr=False)
    """The errors whose greatest is the value; None where the value is of all rows together."""

    @property
    def label(self) -> str:
        """The name as people read it: a metric that is 1 - cosine is called so."""
        output, dot, name = self.name.rpartition(".")
        return f"{output}{dot}{LABELS.get(name, name)}"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table of metrics.

    Attributes:
        name: the last part of a metric's name in a report.
        meaning: its formula, or what it counts; a is the reference, b the output.
        most: a bound of at least this accepts unrelated outputs, so it is refused.
        table: bound by compute precision, for where no noise was measured; empty: the bound is exact or measured.
        least: lower limit of a measured bound; None: no bound is measured.
        squared: grows as the square of an error, so the factor on its noise is squared.
        centred: magnitude of a value that is centred at zero: some runs have almost no error by chance.
    """

    name: str
    meaning: str
    most: float
    table: Mapping[str, float] = field(default_factory=dict)
    least: float | None = None
    squared: bool = False
    centred: bool = False


def _by_precision(fp32: float, fp16: float, bf16: float) -> dict[str, float]:
    return {"fp32": fp32, "fp16": fp16, "bf16": bf16}


VECTOR_METRICS = (
    MetricSpec("rel_l2", "‖b−a‖ / ‖a‖", 1.0, _by_precision(5e-5, 1e-2, 5e-2), 1e-6),
    MetricSpec("cosine", "1 − cos(a, b) = ½‖â−b̂‖²", 1.0, _by_precision(1e-9, 5e-5, 1e-3), 1e-12, squared=True),
    MetricSpec("norm_ratio", "|‖b‖/‖a‖ − 1|", 1.0, _by_precision(1e-5, 2e-3, 1e-2), 1e-6),
    MetricSpec("max_abs_rms", "max |b−a| / rms(a)", 10.0, _by_precision(5e-5, 3e-2, 1.5e-1), 1e-5),
    MetricSpec("neighbour_order", "neighbours that are overtaken across a gap that noise cannot close", 1.0),
)
"""Metrics of vectors (design §8). Bounds of the table: in fp32 at least 5 times the worst row of correct artifacts
under the kernels of several processors, in fp16 twice (``make calibrate``; numbers in docs/power.md). A measured bound
is never below eight units in the last place of float32, and what follows from that. Zeros have rel_l2 1."""

SYSTEMATIC_METRICS = (
    MetricSpec("mean_signed", "max |column mean of (b−c)/rms(c)|, c the mean of legitimate runs", 1.0, {}, 1e-5),
    MetricSpec("mean_norm", "|mean of ‖b‖/‖c‖ − 1|, c the mean of legitimate runs", 1.0, {}, 1e-6, centred=True),
)
"""Metrics of systematic errors; their bounds are measured only."""

TIERS = (1, 5, 50, 1000)
"""Sizes of the tiers of most likely reference tokens whose log-probabilities are bounded; ``all`` is the last tier."""


def _tier(name: str, tokens: str, table: Mapping[str, float], least: float) -> MetricSpec:
    return MetricSpec(f"{name}_error", f"max |Δ log-probability| over {tokens}", 5.0, table, least)


LOGIT_METRICS = (
    MetricSpec("kl_p99", "99th percentile of KL(a ‖ b)", 0.1, _by_precision(1e-9, 1e-3, 5e-3), 1e-12, squared=True),
    MetricSpec("kl_max", "max of KL(a ‖ b)", 1.0, _by_precision(1e-8, 1e-2, 5e-2), 1e-11, squared=True),
    _tier("top1", "the most likely token", _by_precision(1e-4, 0.03, 0.07), 2e-6),
    _tier("top5", "the 5 most likely tokens", _by_precision(2.5e-4, 0.1, 0.25), 2e-6),
    _tier("top50", "the 50 most likely tokens", _by_precision(3e-4, 0.2, 0.5), 5e-6),
    _tier("top1000", "the 1,000 most likely tokens", _by_precision(4e-4, 0.25, 0.6), 5e-6),
    _tier("all", "all tokens", _by_precision(5e-4, 0.5, 1.2), 1e-5),
    MetricSpec("flips", "changes of the most likely token beyond a tie", 1.0),
    MetricSpec("tie_flips", "changes of the most likely token within a tie", 1e6),
)
"""Metrics of logits (validation-methods §14.2, §14.3). The bounds of the table as above; the tiers of bf16 are those of
fp16, scaled by √KL. A measured bound is never below some units in the last place of a float32 logit of size 10."""

ADAPTER_METRICS = (
    MetricSpec("delta_cosine", "1 − cos of the changes that an adapter makes", 0.5, {}, 1e-8, squared=True),
    MetricSpec("delta_norm", "|ratio of the sizes of these changes − 1|", 0.5, {}, 1e-5, centred=True),
)
"""Metrics of the change that an adapter makes to log-probabilities (validation-methods §14.2)."""

SCORE_METRICS = (
    MetricSpec("score_error", "max |b−a| over the labels of a row", 1.0, _by_precision(5e-5, 3e-2, 1.5e-1), 2e-6),
    MetricSpec("document_order", "documents of a query that are overtaken across a gap that noise cannot close", 1.0),
    MetricSpec("label_order", "labels of a row that are overtaken across a gap that noise cannot close", 1.0),
)
"""Metrics of scores by document and of logits by label. The table of ``score_error`` and the lower limit of its
measured bound are multiples of the root mean square of all scores; the bounds are those of ``max_abs_rms``."""

SPARSE_METRICS = (
    MetricSpec("dot_error", "max |b·b′ − a·a′| / (‖a‖ ‖a′‖) over two rows", 1.0, _by_precision(1e-4, 2e-2, 1e-1), 2e-6),
    MetricSpec("word_order", "strong words that are overtaken across a gap that noise cannot close", 1.0),
)
"""Metrics of sparse vectors beside those of vectors; the bounds of the table are twice those of ``rel_l2``."""

MAXSIM_METRICS = (
    MetricSpec("maxsim_error", "max |Δ MaxSim| / vectors of the query", 1.0, _by_precision(1e-4, 2e-2, 1e-1), 1e-6),
    MetricSpec("document_order", "documents that a query ranks otherwise across a gap that noise cannot close", 1.0),
)
"""Metrics of the vectors of tokens beside those of vectors; the bounds of the table are twice those of ``rel_l2``."""

METRICS = (
    *(*VECTOR_METRICS, *SYSTEMATIC_METRICS, *LOGIT_METRICS, *ADAPTER_METRICS),
    *(*SCORE_METRICS, *SPARSE_METRICS, MAXSIM_METRICS[0]),
)
"""All built-in metrics."""


def names(specs: Iterable[MetricSpec]) -> tuple[str, ...]:
    """Return the names of metrics."""
    return tuple(spec.name for spec in specs)


def table_bounds(specs: Iterable[MetricSpec], precision: str) -> dict[str, float]:
    """Return the bounds of the table in a precision; empty if it has no such precision."""
    return {spec.name: spec.table[precision] for spec in specs if precision in spec.table}


def least_bounds(specs: Iterable[MetricSpec]) -> dict[str, float]:
    """Return the lower limit of each measured bound."""
    return {spec.name: spec.least for spec in specs if spec.least is not None}


def most_bounds(specs: Iterable[MetricSpec]) -> dict[str, float]:
    """Return the exclusive upper limit of each bound."""
    return {spec.name: spec.most for spec in specs}
