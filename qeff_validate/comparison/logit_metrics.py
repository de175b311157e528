# SPDX-License-Identifier: Apache-2.0
"""Metrics and gates for a language model's logits under teacher forcing (validation-methods §14.2, §14.3).

A row holds the logits of one decoding step; reference and runtime have read the same tokens before it.
Metrics are computed on log-probabilities ℓ = z − logsumexp(z) in float64, which removes a constant shift exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import NOISE_SHARE, PRECISIONS, Bound, gate_bounds, overridden
from qeff_validate.comparison.metric import (
    LOGIT_METRICS,
    TIERS,
    ErrorsByRow,
    Metric,
    least_bounds,
    most_bounds,
    names,
    table_bounds,
)
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.vector_metrics import Floats, systematic_metrics, worst_row
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.tensors import Array

ERRORS = (*(f"top{k}_error" for k in TIERS), "all_error")

LOGIT_GATES = names(LOGIT_METRICS)
"""Metrics of logits that need a bound; those of adapters come on top."""

FALLBACK: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {precision: table_bounds(LOGIT_METRICS, precision) for precision in PRECISIONS}
)
"""Bounds of logits by precision."""

MOST: Mapping[str, float] = MappingProxyType(most_bounds(LOGIT_METRICS))
"""Exclusive upper limits of the bounds of logits; a flip beyond a tie is never accepted."""

LEAST: Mapping[str, float] = MappingProxyType(least_bounds(LOGIT_METRICS))
"""Lower limits of measured bounds of logits."""

BLOCK = 1 << 18
"""Logits whose errors are computed at a time: beyond some MB, an array costs more to allocate than to compute."""

SIGMAS = 4.0
"""A reference margin of at most this many standard deviations of logit noise is a tie (validation-methods §12.4)."""


def noise_level(precision: str) -> float:
    """Return the assumed noise of a log-probability in a precision; infinity if the table has no such precision."""
    return float(np.sqrt(2 * FALLBACK[precision]["kl_p99"])) / NOISE_SHARE if precision in FALLBACK else math.inf


@dataclass(frozen=True, slots=True)
class Text:
    """One continuation: the label of its prompt, and the indices of its rows."""

    label: str
    rows: range


def log_softmax(logits: Array) -> Floats:
    """Return log-probabilities in float64 over the last axis; NaN in rows that hold NaN or infinity."""
    log_probabilities: Floats = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        log_probabilities -= log_probabilities.max(axis=-1, keepdims=True)
        log_probabilities -= np.log(np.exp(log_probabilities).sum(axis=-1, keepdims=True))
    return log_probabilities


def logit_bounds(precision: str, *, override: Mapping[str, Any], floor: Floor | None = None) -> dict[str, Bound]:
    """Return the bound of each gate; metrics without a sound bound are left out.

    Args:
        precision: profile of the artifact.
        override: the case's own bounds, with ``why``.
        floor: the errors of legitimate runs; None: bounds come from the table.
    """
    bounds = gate_bounds(precision, floor, table=FALLBACK, least=LEAST, most=MOST)
    if bounds:
        bounds["flips"] = Bound(0.0, "exact", "no token changes but between two that are level within the noise")
    return bounds | {name: bound for name, bound in overridden(override, bounds).items() if name in LOGIT_GATES}


def logit_errors(reference: Array, actual: Array) -> dict[str, float]:
    """Return the value of each metric with a measured bound, for logits ``[n, vocab]`` of the same rows."""
    height, width = reference.shape
    rows = max(1, BLOCK // width)
    blocks = [slice(start, start + rows) for start in range(0, height, rows)]
    parts = [_row_errors(log_softmax(reference[block]), log_softmax(actual[block])) for block in blocks]
    kl, tiers = map(np.concatenate, zip(*parts, strict=True))
    return {metric.name: metric.value for metric in _metrics(kl, tiers) if metric.name in LEAST}


def systematic_logit_metrics(center: Array, actual: Array) -> list[Metric]:
    """Return the systematic errors of logits ``[n, vocab]``; a constant shift of a row is not an error."""
    wanted, got = (array.astype(np.float64) for array in (center, actual))
    return systematic_metrics(wanted - wanted.mean(axis=1, keepdims=True), got - got.mean(axis=1, keepdims=True))


def judge_logits(
    reference: Array,
    actual: Array,
    bounds: Mapping[str, Bound],
    *,
    labels: Sequence[str],
    texts: Sequence[Text],
    eos: frozenset[int],
    finite: Sequence[int] | None = None,
) -> list[GateResult]:
    """Compare logits ``[n, vocab]`` of the same continuations with their bounds.

    Args:
        reference: logits of the reference.
        actual: logits of the runtime.
        bounds: from `logit_bounds`.
        labels: one per row.
        texts: the continuations.
        eos: token ids that end a text.
        finite: indices of the rows that are finite on both sides, ascending; None: all.

    Returns:
        The gates, and without a bound ``kl_p50`` and ``same_top1``; empty if there are no rows.
    """
    places = np.arange(len(reference)) if finite is None else np.array(finite, dtype=int)
    if not places.size:
        return []
    if len(places) < len(reference):
        reference, actual = reference[places], actual[places]
    wanted, got = log_softmax(reference), log_softmax(actual)
    kl, tiers = _row_errors(wanted, got)
    results = [_gate(metric, bounds.get(metric.name), labels, places) for metric in _metrics(kl, tiers)]
    return results + _flips(wanted, got, kl, bounds, labels, texts, eos, places)


def _row_errors(wanted: Floats, got: Floats) -> tuple[Floats, Floats]:
    """Return the KL divergence of each row, and its greatest error in each tier, float64 ``[n]`` and ``[n, tiers]``."""
    error = np.abs(got - wanted)
    likely = np.take_along_axis(error, _most_likely(wanted, TIERS[-1]), axis=-1)
    tiers = [*(likely[:, :k] for k in TIERS), error]
    kl = np.maximum((np.exp(wanted) * (wanted - got)).sum(axis=-1), 0.0)
    return kl, np.stack([tier.max(axis=-1) for tier in tiers], axis=1)


def _metrics(kl: Floats, tiers: Floats) -> list[Metric]:
    metrics = [
        Metric("kl_p99", float(np.quantile(kl, 0.99)), {"row": int(np.argmax(kl))}),
        worst_row("kl_max", kl),
        Metric("kl_p50", float(np.median(kl)), {"row": int(np.argmax(kl))}),
    ]
    return metrics + [worst_row(name, tier) for name, tier in zip(ERRORS, tiers.T, strict=True)]


def _most_likely(log_probabilities: Floats, count: int) -> NDArray[np.int_]:
    """Return the indices of the greatest values of each row, the greatest first, int64 ``[n, count]``."""
    negative = -log_probabilities
    if count >= negative.shape[1]:
        return np.argsort(negative, axis=-1)
    found = np.argpartition(negative, count - 1, axis=-1)[:, :count]
    order = np.argsort(np.take_along_axis(negative, found, axis=-1), axis=-1)
    return np.take_along_axis(found, order, axis=-1)


def _flips(
    wanted: Floats,
    got: Floats,
    kl: Floats,
    bounds: Mapping[str, Bound],
    labels: Sequence[str],
    texts: Sequence[Text],
    eos: frozenset[int],
    places: NDArray[np.int_],
) -> list[GateResult]:
    """Return the gates on changed top-1 tokens: none beyond a tie, and ties within the budget expected from noise."""
    ours, theirs = wanted.argmax(axis=-1), got.argmax(axis=-1)
    rows = np.arange(len(ours))
    margin = wanted[rows, ours] - wanted[rows, theirs]
    allowed = bounds["kl_p99"].value if "kl_p99" in bounds else 0.0
    sigma = np.sqrt(2 * np.minimum(kl, allowed))  # a greater error must not widen its own tie
    changed = ours != theirs
    tie = changed & (margin <= SIGMAS * sigma)
    runner_up = np.sort(wanted, axis=-1)[:, -2]
    gap = wanted[rows, ours] - runner_up
    spread = float(np.maximum(np.sqrt(2 * np.minimum(np.median(kl), allowed)), 1e-300))
    expected = float(sum(0.5 * math.erfc(value / spread / 2) for value in gap))  # two logits with noise `spread` each
    budget = Bound(math.ceil(1 + 3 * expected), "floor", f"{expected:.2g} ties are expected to flip by the noise")
    beyond, kinds = changed & ~tie, _kinds(ours, theirs, tie, eos)
    place = {"row": int(np.argmax(beyond if beyond.any() else changed))}
    return [
        _gate(
            Metric("flips", float(beyond.sum()), {**place, **_divergence(ours, theirs, beyond, kinds, texts, places)}),
            bounds.get("flips"),
            labels,
            places,
        ),
        _gate(
            Metric("tie_flips", float(tie.sum()), {"row": int(np.argmax(tie))}),
            budget if bounds else None,
            labels,
            places,
        ),
        _gate(Metric("same_top1", float(np.mean(~changed)), place), None, labels, places),
    ]


def _kinds(ours: Array, theirs: Array, tie: Array, eos: frozenset[int]) -> list[str]:
    """Return the kind of each row's change: ``stop`` if one token ends the text, ``tie``, or ``non-tie``."""
    ends = np.isin(ours, list(eos)) != np.isin(theirs, list(eos))
    return ["stop" if end else "tie" if level else "non-tie" for end, level in zip(ends, tie, strict=True)]


def _divergence(
    ours: Array,
    theirs: Array,
    beyond: Array,
    kinds: Sequence[str],
    texts: Sequence[Text],
    places: NDArray[np.int_],
) -> dict[str, Any]:
    """Describe the first divergent token, beyond a tie if there is one, and count texts by the kind of their first."""
    changed = np.flatnonzero(ours != theirs)
    if not changed.size:
        return {}
    at = int(np.argmax(beyond) if beyond.any() else changed[0])
    row = int(places[at])
    text = next(text for text in texts if row in text.rows)
    kind_by_row = {int(places[index]): kinds[index] for index in changed.tolist()}
    first = [next(row for row in text.rows if row in kind_by_row) for text in texts if {*text.rows} & {*kind_by_row}]
    return {
        "prompt": text.label,
        "step": row - text.rows.start,
        "kind": kinds[at],
        "tokens": [int(ours[at]), int(theirs[at])],
        "texts": dict(Counter(kind_by_row[row] for row in first)),
    }


def rows_beyond(reference: Array, actual: Array, bounds: Mapping[str, Bound]) -> NDArray[np.bool_]:
    """Return which rows exceed the bound of an error or of the KL divergence, or are not finite, bool ``[n]``."""
    with np.errstate(invalid="ignore"):
        kl, tiers = _row_errors(log_softmax(reference), log_softmax(actual))
    most = np.array([bounds[name].value for name in ERRORS])
    within: NDArray[np.bool_] = (kl <= bounds["kl_max"].value) & (tiers <= most).all(axis=1)
    return ~within


def _gate(metric: Metric, bound: Bound | None, labels: Sequence[str], places: NDArray[np.int_]) -> GateResult:
    row = int(places[metric.worst["row"]])
    place = {**metric.worst, "row": row, "text": labels[row]}
    errors_by_row = metric.by_row and ErrorsByRow.of(metric.by_row.values, places.tolist(), len(labels))
    return GateResult(Metric(f"logits.{metric.name}", metric.value, place, errors_by_row), bound)
