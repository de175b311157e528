# SPDX-License-Identifier: Apache-2.0
"""Measurements and verdict for a language model's logits under teacher forcing (validation-methods §14.2, §14.3).

A row holds the logits from which one token of a continuation is chosen; both sides have read the same tokens before it.
All work is on log-probabilities ℓ = z − logsumexp(z) in float64, which removes a constant shift exactly.
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

from qeff_validate.comparison.bounds import NOISE_SHARE, Bound, gate_bounds, overridden
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.vector_metrics import Floats, Metric, systematic_metrics, worst_row
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.tensors import Array

TIERS = (1, 5, 50, 1000)
"""Numbers of likeliest tokens of the reference in which a log-probability may not be off; ``all`` comes after them."""

ERRORS = (*(f"top{k}_error" for k in TIERS), "all_error")

LOGIT_GATES = ("kl_p99", "kl_max", *ERRORS, "flips", "tie_flips")
"""What a verdict on logits needs, beside adapters."""

FALLBACK: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "fp32": {"kl_p99": 1e-9, "kl_max": 1e-8, **dict(zip(ERRORS, (1e-4, 2.5e-4, 3e-4, 4e-4, 5e-4), strict=True))},
        "fp16": {"kl_p99": 1e-3, "kl_max": 1e-2, **dict(zip(ERRORS, (0.03, 0.1, 0.2, 0.25, 0.5), strict=True))},
        "bf16": {"kl_p99": 5e-3, "kl_max": 5e-2, **dict(zip(ERRORS, (0.07, 0.25, 0.5, 0.6, 1.2), strict=True))},
    }
)
"""Bounds by precision: in fp32 at least 5 times the worst row of healthy artifacts under kernels of several processors,
in fp16 twice (``make calibrate``; numbers in docs/power.md). The tiers of bf16 are those of fp16, scaled by √KL."""

MOST = {"kl_p99": 0.1, "kl_max": 1.0, **dict.fromkeys(ERRORS, 5.0), "flips": 1.0, "tie_flips": 1e6}
"""A bound that reaches this accepts another distribution; no flip beyond a tie is ever accepted."""

LEAST: Mapping[str, float] = MappingProxyType(
    {"kl_p99": 1e-12, "kl_max": 1e-11, **dict(zip(ERRORS, (2e-6, 2e-6, 5e-6, 5e-6, 1e-5), strict=True))}
)
"""No measured bound is below these: some units in the last place of a float32 logit of size 10."""

SIGMAS = 4.0
"""A reference margin within so many standard deviations of the logits' noise is a tie (validation-methods §12.4)."""


def noise_level(precision: str) -> float:
    """Return the noise that a precision is taken to have in a log-probability; infinity if it has no profile."""
    return float(np.sqrt(2 * FALLBACK[precision]["kl_p99"])) / NOISE_SHARE if precision in FALLBACK else math.inf


@dataclass(frozen=True, slots=True)
class Text:
    """One continuation: the label of its prompt, and its rows."""

    label: str
    rows: range


def log_softmax(logits: Array) -> Floats:
    """Return log-probabilities in float64 over the last axis; NaN in rows that hold NaN or infinity."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide = wide - wide.max(axis=-1, keepdims=True)
        found: Floats = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return found


def logit_bounds(precision: str, *, override: Mapping[str, Any], floor: Floor | None = None) -> dict[str, Bound]:
    """Return the bound of each gate; a metric without a sound bound has none.

    Args:
        precision: profile of what computes.
        override: the case's own bounds, with ``why``.
        floor: the errors of legitimate runs; None: bounds are those of the precision's profile.
    """
    bounds = gate_bounds(precision, floor, table=FALLBACK, least=LEAST, most=MOST)
    if bounds:
        bounds["flips"] = Bound(0.0, "exact", "no token changes but between two that are level within the noise")
    return bounds | {name: bound for name, bound in overridden(override).items() if name in LOGIT_GATES}


def logit_errors(reference: Array, actual: Array) -> dict[str, float]:
    """Return the value of each metric that has a bound by precision, for logits of the same rows."""
    found = _errors(log_softmax(reference), log_softmax(actual))
    return {metric.name: metric.value for metric in found if metric.name in LEAST}


def systematic_logit_metrics(center: Array, actual: Array) -> list[Metric]:
    """Return the systematic parts of logits' errors; a constant shift of a row is none."""
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
    kept: Sequence[int] | None = None,
) -> list[GateResult]:
    """Measure logits ``[n, vocab]`` of the same continuations against their bounds.

    Args:
        reference: of the reference.
        actual: of the same shape.
        bounds: from `logit_bounds`.
        labels: one for each row.
        texts: the rows of each continuation.
        eos: ids that end a text.
        kept: the rows that are measured, in order, those that are finite on both sides; None: all.

    Returns:
        Gates, and what is shown: ``kl_p50``, ``same_top1`` and the first divergent token; nothing without rows.
    """
    places = np.arange(len(reference)) if kept is None else np.array(kept, dtype=int)
    if not places.size:
        return []
    if len(places) < len(reference):
        reference, actual = reference[places], actual[places]
    wanted, got = log_softmax(reference), log_softmax(actual)
    judged = [_placed(metric, bounds.get(metric.name), labels, places) for metric in _errors(wanted, got)]
    return judged + _flips(wanted, got, _divergences(wanted, got), bounds, labels, texts, eos, places)


def _divergences(wanted: Floats, got: Floats) -> Floats:
    """Return the KL divergence of each row."""
    kl: Floats = np.maximum((np.exp(wanted) * (wanted - got)).sum(axis=-1), 0.0)
    return kl


def _errors(wanted: Floats, got: Floats) -> list[Metric]:
    error, kl, order = np.abs(got - wanted), _divergences(wanted, got), np.argsort(-wanted, axis=-1)
    found = [
        Metric("kl_p99", float(np.quantile(kl, 0.99)), {"row": int(np.argmax(kl))}),
        worst_row("kl_max", kl),
        Metric("kl_p50", float(np.median(kl)), {"row": int(np.argmax(kl))}),
    ]
    for k, name in zip((*TIERS, wanted.shape[1]), ERRORS, strict=True):
        tier = np.take_along_axis(error, order[:, : min(k, wanted.shape[1])], axis=-1)
        found.append(worst_row(name, tier.max(axis=-1)))
    return found


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
    """Judge changed choices: none beyond a tie, and ties within the budget that the noise gives."""
    ours, theirs = wanted.argmax(axis=-1), got.argmax(axis=-1)
    rows = np.arange(len(ours))
    margin = wanted[rows, ours] - wanted[rows, theirs]
    allowed = bounds["kl_p99"].value if "kl_p99" in bounds else 0.0
    sigma = np.sqrt(2 * np.minimum(kl, allowed))  # a worse row does not excuse itself
    changed = ours != theirs
    tie = changed & (margin <= SIGMAS * sigma)
    runner_up = np.sort(wanted, axis=-1)[:, -2]
    gap = wanted[rows, ours] - runner_up
    spread = float(np.maximum(np.sqrt(2 * np.minimum(np.median(kl), allowed)), 1e-300))
    expected = float(sum(0.5 * math.erfc(value / spread / 2) for value in gap))  # two logits of noise `spread` each
    budget = Bound(math.ceil(1 + 3 * expected), "floor", f"{expected:.2g} ties are expected to flip by the noise")
    beyond, kinds = changed & ~tie, _kinds(ours, theirs, tie, eos)
    place = {"row": int(np.argmax(beyond if beyond.any() else changed))}
    return [
        _placed(
            Metric("flips", float(beyond.sum()), {**place, **_divergence(ours, theirs, beyond, kinds, texts, places)}),
            bounds.get("flips"),
            labels,
            places,
        ),
        _placed(
            Metric("tie_flips", float(tie.sum()), {"row": int(np.argmax(tie))}),
            budget if bounds else None,
            labels,
            places,
        ),
        _placed(Metric("same_top1", float(np.mean(~changed)), place), None, labels, places),
    ]


def _kinds(ours: Array, theirs: Array, tie: Array, eos: frozenset[int]) -> list[str]:
    """Name the kind of each row's change: a token that ends the text on one side alone, a tie, or neither."""
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
    """Describe the first divergent token, of those beyond a tie if there are any; count texts by the kind of theirs."""
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
    """Say of each row whether an error or the KL is beyond its bound; a row that is not finite is."""
    with np.errstate(invalid="ignore"):
        wanted, got = log_softmax(reference), log_softmax(actual)
        kl = (np.exp(wanted) * (wanted - got)).sum(axis=-1)
        error = np.take_along_axis(np.abs(got - wanted), np.argsort(-wanted, axis=-1), axis=-1)
    fine: NDArray[np.bool_] = kl <= bounds["kl_max"].value
    for k, name in zip((*TIERS, wanted.shape[1]), ERRORS, strict=True):
        fine &= error[:, :k].max(axis=-1) <= bounds[name].value
    return ~fine


def _placed(metric: Metric, bound: Bound | None, labels: Sequence[str], places: NDArray[np.int_]) -> GateResult:
    row = int(places[metric.worst["row"]])
    place = {**metric.worst, "row": row, "text": labels[row]}
    return GateResult(Metric(f"logits.{metric.name}", metric.value, place), bound)
