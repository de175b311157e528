# SPDX-License-Identifier: Apache-2.0
"""Bounds with their reasons, and the comparison: structure first, then numbers; the worst row decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.metrics import GATES, Metric, neighbour_metrics, row_errors, worst_row
from qeff_validate.tensors import Array, Tensors

Status = Literal["pass", "fail", "inconclusive", "error", "not_run"]

ROW_GATES = ("rel_l2", "cosine", "norm_ratio", "max_abs_rms")

FALLBACK: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "fp32": {"rel_l2": 5e-5, "cosine": 1e-9, "norm_ratio": 1e-5, "max_abs_rms": 5e-5},
        "fp16": {"rel_l2": 1e-2, "cosine": 5e-5, "norm_ratio": 2e-3, "max_abs_rms": 3e-2},
        "bf16": {"rel_l2": 5e-2, "cosine": 1e-3, "norm_ratio": 1e-2, "max_abs_rms": 1.5e-1},
    }
)
"""Bounds by precision (DESIGN §8). Compressed weights and state have none: their noise is measured by emulation."""

EMULATED_FACTOR = 2.0
"""An artifact may be off so many times as far as an emulated run; what its arithmetic costs comes on top.

How a card lays out blocks is not documented. Runs with blocks of 16 and of 64, along the other axis, with scales that
do not saturate, with ties away from zero, and from fp16 weights were off by 0.64 to 1.55 times as much as the emulated
one, over three embeddings and three language models with 33 to 60 rows; truncation, which is not to the nearest, by up
to 7.8 times.
"""

FLOOR_FACTOR, FLOOR_LEAST, FLOOR_MOST = 10.0, 1e-6, 5e-5
"""The fp32 bound of rel_l2 is the floor times the factor, within these limits (DESIGN §8)."""

NOISE_SHARE = 5.0
"""Emulated fp16 noise (2e-3) is a fifth of its fallback bound (validation-methods §14.1); used where no floor is."""

MOST = {"rel_l2": 1.0, "cosine": 1.0, "norm_ratio": 1.0, "max_abs_rms": 10.0, "neighbour_order": 1.0}
"""A bound that reaches this accepts unrelated or absent vectors (zeros have rel_l2 1), so it is refused."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The greatest accepted value of a metric, where it comes from, and why."""

    value: float
    source: Literal["floor", "case", "fallback", "exact", "emulated"]
    why: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A metric beside its bound; without a bound it is shown and never a gate."""

    metric: Metric
    bound: Bound | None

    @property
    def passed(self) -> bool:
        """True for a gate that holds and for what is only shown; NaN fails by construction."""
        return self.bound is None or 0 <= self.metric.value <= self.bound.value


@dataclass(frozen=True, slots=True)
class Verdict:
    """All measurements for one (case, runtime) and what follows from them."""

    status: Status
    reason: str
    metrics: tuple[Judged, ...] = ()
    planned: int = 0
    compared: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of an output are: their labels for messages, and which of them hold no token."""

    labels: Sequence[str]
    tokenless: frozenset[int] = field(default_factory=frozenset)


def check_tolerance(where: str, values: Mapping[str, Any], most: Mapping[str, float] = MOST) -> None:
    """Refuse a tolerance that names no metric, gives no reason, or has a bound that gates nothing.

    Args:
        where: what to call it in an error.
        values: metric to bound, and ``why``.
        most: the metrics that there are, with what a bound must stay below.

    Raises:
        ConfigError: an unknown metric, a bound that is NaN, infinite, negative or absurdly wide, or no ``why``.
    """
    bounds = {name: value for name, value in values.items() if name != "why"}
    for name, value in bounds.items():
        if name not in most:
            raise ConfigError(f"{where}: no metric is called {name!r}.{suggest(name, most)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < most[name]):
            raise ConfigError(
                f"{where}.{name}: {value!r} is no usable bound: give a number from 0 to below {most[name]:g}"
            )
    if bounds and not str(values.get("why") or "").strip():
        raise ConfigError(f"{where}: a bound needs its reason: add why: '…'")


def errors_of(reference: Tensors, emulated: Tensors, rows: Rows) -> dict[str, float]:
    """Return the worst value of each row metric of emulated outputs, over all rows that hold a token."""
    kept = [row for row in range(len(rows.labels)) if row not in rows.tokenless]
    found = [row_errors(array[kept], emulated[name][kept]) for name, array in reference.items()]
    return {name: max(worst_row(name, getattr(errors, name)).value for errors in found) for name in ROW_GATES}


def emulated_bounds(
    precision: str,
    measured: Mapping[str, float],
    fallback: Mapping[str, Mapping[str, float]],
    most: Mapping[str, float],
) -> dict[str, Bound]:
    """Return bounds from the errors of an emulated run; none for a metric whose noise would let anything pass.

    Args:
        precision: a profile with a ``+``.
        measured: the emulated run's error by metric.
        fallback: bounds by precision; those of what computes come on top.
        most: what a bound must stay below.
    """
    compute, _, kept = precision.partition("+")
    bounds = {}
    for name, arithmetic in fallback[compute].items():
        value = EMULATED_FACTOR * measured[name] + arithmetic
        if value < most[name]:
            why = f"{EMULATED_FACTOR:g} x emulated {kept}, {measured[name]:.2g}, and the {compute} profile"
            bounds[name] = Bound(value, "emulated", why)
    return bounds


def bounds_for(
    precision: str, *, floor: float | None, override: Mapping[str, Any], measured: Mapping[str, float] | None = None
) -> dict[str, Bound]:
    """Return the bound of every gate for a precision profile; empty if the profile has no sound bound.

    Args:
        precision: ``fp32``, ``fp16``, ``bf16`` or a profile without fallback such as ``fp16+mxfp6``.
        floor: worst relative L2 of the float32 reference against float64; None if it was not measured.
        override: the case's own bounds, with ``why``.
        measured: from `errors_of`, for a profile without fallback.
    """
    bounds = {
        name: Bound(value, "fallback", f"{precision} profile") for name, value in FALLBACK.get(precision, {}).items()
    }
    if measured is not None and not bounds:
        bounds = emulated_bounds(precision, measured, FALLBACK, MOST)
    if precision == "fp32" and floor is not None:
        value = float(np.clip(FLOOR_FACTOR * floor, FLOOR_LEAST, FLOOR_MOST))
        why = f"{FLOOR_FACTOR:g} x floor {floor:.2e}, within [{FLOOR_LEAST:g}, {FLOOR_MOST:g}]"
        bounds["rel_l2"] = Bound(value, "floor", why)
    if bounds:
        bounds["neighbour_order"] = Bound(0.0, "exact", "no neighbour moves further than noise allows")
    for name, value in override.items():
        if name != "why":
            bounds[name] = Bound(float(value), "case", str(override["why"]))
    return bounds


def compare(
    reference: Tensors,
    actual: Tensors,
    bounds: Mapping[str, Bound],
    *,
    rows: Rows,
    floor: float | None = None,
    seed: int = 0,
) -> Verdict:
    """Compare outputs of a target with the reference: names, dtypes, shapes, finiteness, then every metric.

    Args:
        reference: by output name, [n, d] float arrays; rows without a token hold zeros.
        actual: the same names, dtypes and shapes, or the verdict is ``fail``.
        bounds: a bound for each gate.
        rows: labels and token-less rows; these must be zeros in ``actual`` and take no part in the metrics.
        floor: the measured noise of the reference, for the order of neighbours.
        seed: draws rows for pairwise metrics.
    """
    planned = len(reference) * len(rows.labels)
    problem = structure_problem(reference, actual, len(rows.labels))
    if problem:
        return Verdict("fail", problem, planned=planned)
    bad = non_finite(actual, rows)
    if bad:
        return Verdict("fail", bad[0], (bad[1],), planned=planned)
    if not math.isfinite(sum(float(np.sum(array, dtype=np.float64)) for array in reference.values())):
        return Verdict("inconclusive", "the reference itself holds NaN or infinity", planned=planned)
    kept = [row for row in range(len(rows.labels)) if row not in rows.tokenless]
    if not reference or not kept:
        return Verdict("inconclusive", "nothing to compare: no output, or no row with a token", planned=planned)
    missing = [name for name in GATES if name not in bounds]
    if missing:
        reason = f"no sound bound for {', '.join(missing)}: give one with its reason in the case's tolerance"
        return Verdict("inconclusive", reason, planned=planned)
    judged: list[Judged] = []
    for name in sorted(reference):
        judged += _judge(name, reference[name], actual[name], bounds, rows, kept, floor, seed)
    return _conclude(judged, planned, compared=len(reference) * len(rows.labels))


def structure_problem(reference: Tensors, actual: Tensors, n: int) -> str | None:
    """Say in what names, dtypes or shapes differ; None if they are alike and have n rows."""
    if set(reference) != set(actual):
        missing, extra = sorted(set(reference) - set(actual)), sorted(set(actual) - set(reference))
        return f"outputs differ: wanted {sorted(reference)}, got {sorted(actual)}; missing {missing}, extra {extra}"
    for name, wanted in reference.items():
        got = actual[name]
        if wanted.ndim != 2 or len(wanted) != n:
            return f"reference {name!r} has shape {list(wanted.shape)}, wanted {n} rows of [n, d]"
        if got.dtype != wanted.dtype:
            return f"output {name!r} has dtype {got.dtype}, the reference {wanted.dtype}"
        if got.shape != wanted.shape:
            return f"output {name!r} has shape {list(got.shape)}, the reference {list(wanted.shape)}"
    return None


def non_finite(actual: Tensors, rows: Rows) -> tuple[str, Judged] | None:
    """Say where NaN or infinity stands first, with the gate that it breaks; None if all values are finite."""
    for name, array in actual.items():
        # a sum over a row is NaN or infinite if any element is; in float64 it cannot overflow by itself
        finite = np.isfinite(np.sum(array, axis=1, dtype=np.float64))
        if not finite.all():
            row = int(np.argmin(finite))
            column = int(np.argmin(np.isfinite(array[row])))
            count = int(sum(np.count_nonzero(~np.isfinite(array[r])) for r in np.flatnonzero(~finite)))
            worst = {"row": row, "column": column, "text": rows.labels[row]}
            metric = Metric(f"{name}.non_finite", float(count), worst)
            reason = (
                f"{name}: {count} of {array.size} values are NaN or infinite in {np.count_nonzero(~finite)} of"
                f" {len(array)} rows; first at row {row}, column {column} ({rows.labels[row]!r})"
            )
            return reason, Judged(metric, Bound(0.0, "exact", "every value must be finite"))
    return None


def _judge(
    name: str,
    reference: Array,
    actual: Array,
    bounds: Mapping[str, Bound],
    rows: Rows,
    kept: list[int],
    floor: float | None,
    seed: int,
) -> list[Judged]:
    wanted, got = (reference, actual) if not rows.tokenless else (reference[kept], actual[kept])
    errors = row_errors(wanted, got)
    found = [worst_row(metric, getattr(errors, metric)) for metric in ROW_GATES]
    worst = worst_row("mean_abs", errors.mean_abs)
    found.append(Metric("mean_abs", float(errors.mean_abs.mean()), worst.worst))
    if len(kept) >= 3:
        noise = floor if floor is not None and bounds["rel_l2"].source == "floor" else None
        share = EMULATED_FACTOR if bounds["rel_l2"].source == "emulated" else NOISE_SHARE
        noise = max(noise, FLOOR_LEAST / FLOOR_FACTOR) if noise is not None else bounds["rel_l2"].value / share
        found += neighbour_metrics(wanted, got, noise=noise, seed=seed)
    judged = []
    for metric in found:
        row = kept[metric.worst["row"]]
        place = {**metric.worst, "row": row, "text": rows.labels[row]}
        if metric.name == "max_abs_rms":
            place["column"] = int(np.argmax(np.abs(actual[row].astype(np.float64) - reference[row])))
        judged.append(Judged(Metric(f"{name}.{metric.name}", metric.value, place), bounds.get(metric.name)))
    if rows.tokenless:
        judged.append(_tokenless(name, actual, rows))
    return judged


def _tokenless(name: str, actual: Array, rows: Rows) -> Judged:
    found = sorted(rows.tokenless)
    worst = found[int(np.argmax([np.max(np.abs(actual[row])) for row in found]))]
    count = float(sum(np.count_nonzero(actual[row]) for row in found))
    metric = Metric(f"{name}.tokenless_rows", count, {"row": worst, "text": rows.labels[worst], "rows": len(found)})
    return Judged(metric, Bound(0.0, "exact", "a row without a token pools to zeros"))


def _conclude(judged: list[Judged], planned: int, compared: int) -> Verdict:
    failed = [item for item in judged if not item.passed]
    gates = {item.metric.name.rpartition(".")[2] for item in judged if item.bound is not None}
    if failed:
        status: Status = "fail"
        reason = "; ".join(sentence(item) for item in failed)
    elif not gates.issuperset(GATES):
        status = "inconclusive"
        reason = f"not measured: {', '.join(sorted(set(GATES) - gates))} (at least 3 rows with a token are needed)"
    elif compared < planned:
        status, reason = "inconclusive", f"only {compared} of {planned} rows were compared"
    else:
        status, reason = "pass", ""
    return Verdict(status, reason, tuple(judged), planned, compared)


def all_hold(judged: Sequence[Judged], planned: int) -> Verdict:
    """Return a verdict on all of what was planned: ``pass`` if every gate holds."""
    failed = [item for item in judged if not item.passed]
    status: Status = "fail" if failed else "pass"
    return Verdict(status, "; ".join(map(sentence, failed)), tuple(judged), planned, planned)


def sentence(item: Judged) -> str:
    """Say of a gate that failed: name, value, bound and the worst row."""
    assert item.bound is not None  # only gates fail
    text = f"{item.metric.name} {item.metric.value:.3g}, allowed {item.bound.value:.3g} ({item.bound.source})"
    return f"{text}, worst row {item.metric.worst['row']} ({item.metric.worst['text']!r})"
