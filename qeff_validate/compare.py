# SPDX-License-Identifier: Apache-2.0
"""Bounds with their reasons, and the comparison: structure first, then numbers; the worst row decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from qeff_validate.errors import ConfigError, IncomparableError, suggest
from qeff_validate.floor import Floor, factor, limit
from qeff_validate.metrics import GATES, Metric, neighbour_metrics, row_errors, systematic, worst_row
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

LEAST: Mapping[str, float] = MappingProxyType(
    {"rel_l2": 1e-6, "cosine": 1e-12, "norm_ratio": 1e-6, "max_abs_rms": 1e-5}
)
"""No measured bound is below these: eight units in the last place of float32, and what follows from it."""

STRAYS: Mapping[str, float] = MappingProxyType({"mean_signed": 1e-5, "mean_norm": 1e-6})
"""Systematic parts of a device's error, with the least bound of each."""

STRAY_FACTOR = 1.5
"""How many times the limit of legitimate runs a device may stray, beside the factor of its precision.

The worst of 51 held-out graphs on the simulated device strayed by 1.76 times the limit.
"""

FAR = 20.0
"""A measured bound in float32 may exceed the table's by so much: what is further off is no rounding.

A model that draws random numbers would otherwise widen the bound that it is judged by.
"""

NOISE_SHARE = 5.0
"""Emulated fp16 noise (2e-3) is a fifth of its fallback bound (validation-methods §14.1); used where no floor is."""

MOST = {"rel_l2": 1.0, "cosine": 1.0, "norm_ratio": 1.0, "max_abs_rms": 10.0, "neighbour_order": 1.0}
"""A bound that reaches this accepts unrelated or absent vectors (zeros have rel_l2 1), so it is refused."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The greatest accepted value of a metric, where it comes from, and why."""

    value: float
    source: Literal["floor", "case", "fallback", "exact"]
    why: str
    floor: float | None = None
    """What is usual among legitimate runs, where it was measured."""


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
class Power:
    """Which faults of fixed size the bounds of a verdict would find.

    Attributes:
        tried: faults that were tried on the original model and are no noise.
        missed: those that no bound would find.
        gross: those of them that nobody may ship.
    """

    tried: int
    missed: tuple[str, ...] = ()
    gross: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """All measurements for one (case, runtime) and what follows from them."""

    status: Status
    reason: str
    metrics: tuple[Judged, ...] = ()
    planned: int = 0
    compared: int = 0
    power: Power | None = None

    def discriminating(self, power: Power) -> Verdict:
        """Return the verdict with its power; without a power to find what nobody may ship, nothing passes."""
        if self.status != "pass" or not power.gross:
            return replace(self, power=power)
        reason = (
            f"these bounds would let {', '.join(map(repr, power.gross))} pass, which nobody may ship: give more or"
            " longer rows, tighter bounds of the case's own, or a precision with less noise"
        )
        return replace(self, status="inconclusive", reason=reason, power=power)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of an output are: their labels for messages, and which of them hold no token."""

    labels: Sequence[str]
    tokenless: frozenset[int] = field(default_factory=frozenset)

    def kept(self) -> list[int]:
        """Return the rows that hold a token."""
        return [row for row in range(len(self.labels)) if row not in self.tokenless]


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


def worst_errors(reference: Tensors, outputs: Tensors, rows: Rows) -> dict[str, float]:
    """Return the worst value of each row metric of outputs, over all rows that hold a token."""
    kept = rows.kept()
    found = [row_errors(array[kept], outputs[name][kept]) for name, array in reference.items()]
    return {name: max(worst_row(name, getattr(errors, name)).value for errors in found) for name in ROW_GATES}


def strays(center: Tensors, outputs: Tensors, rows: Rows) -> dict[str, float]:
    """Return the systematic parts of outputs' errors, over all rows that hold a token."""
    kept = rows.kept()
    found = [metric for name, array in center.items() for metric in systematic(array[kept], outputs[name][kept])]
    return {name: float(np.max([metric.value for metric in found if metric.name == name])) for name in STRAYS}


def measured_bound(name: str, floor: Floor, least: float, most: float) -> Bound | None:
    """Return the bound of a metric from the errors of legitimate runs; None if it would reach ``most``.

    Raises:
        IncomparableError: the floor has no errors in this metric.
    """
    if name not in floor.errors:
        raise IncomparableError(f"the noise floor has no errors of the metric {name!r}: measure or record it anew")
    farthest, times = limit(name, floor.errors[name]), factor(floor.profile, name)
    value = max(times * farthest, least)
    if not value < most:
        return None
    why = f"{times:g} x {farthest:.2g}, the 95/95 limit of {len(floor.errors[name])} legitimate runs in {floor.profile}"
    if floor.left_out:
        why += f", with {floor.left_out} texts estimated from the others"
    return Bound(value, "floor", why, floor.level(name))


def gate_bounds(
    precision: str,
    floor: Floor | None,
    *,
    table: Mapping[str, Mapping[str, float]],
    least: Mapping[str, float],
    most: Mapping[str, float],
) -> dict[str, Bound]:
    """Return bounds from the errors of legitimate runs, or those of a precision's table where none were measured.

    Args:
        precision: profile of what computes.
        floor: the errors of legitimate runs.
        table: bounds by precision.
        least: what no measured bound is below, for each metric that gets one.
        most: what a bound must stay below.
    """
    if floor is None:
        return {
            name: Bound(value, "fallback", f"{precision} profile") for name, value in table.get(precision, {}).items()
        }
    near = {name: FAR * value for name, value in table["fp32"].items()} if floor.profile == "fp32" else {}
    made = {
        name: measured_bound(name, floor, value, min(most[name], near.get(name, math.inf)))
        for name, value in least.items()
    }
    return {name: bound for name, bound in made.items() if bound is not None}


def stray_bounds(floor: Floor) -> dict[str, Bound]:
    """Return the bounds of a device's systematic errors."""
    bounds = {}
    for name, least in STRAYS.items():
        if name not in floor.strays:
            raise IncomparableError(f"the noise floor has no {name!r} of a device: measure or record it anew")
        farthest, times = limit(name, floor.strays[name]), STRAY_FACTOR * factor(floor.profile, name)
        why = f"{times:g} x {farthest:.2g}, the 95/95 limit of legitimate runs in {floor.profile} against their mean"
        bounds[name] = Bound(max(times * farthest, least), "floor", why, float(np.median(floor.strays[name])))
    return bounds


def bounds_for(precision: str, *, override: Mapping[str, Any], floor: Floor | None = None) -> dict[str, Bound]:
    """Return the bound of every gate for a precision profile; a metric without a sound bound has none.

    Args:
        precision: ``fp32``, ``fp16``, ``bf16`` or a profile without fallback such as ``fp16+mxfp6``.
        override: the case's own bounds, with ``why``.
        floor: the errors of legitimate runs; None: bounds are those of the precision's profile.
    """
    bounds = gate_bounds(precision, floor, table=FALLBACK, least=LEAST, most=MOST)
    if bounds:
        bounds["neighbour_order"] = Bound(0.0, "exact", "no neighbour moves further than noise allows")
    return bounds | overridden(override)


def overridden(override: Mapping[str, Any]) -> dict[str, Bound]:
    """Return the bounds that a case brings itself."""
    values = {name: float(value) for name, value in override.items() if name != "why"}
    return {name: Bound(value, "case", str(override["why"])) for name, value in values.items()}


def compare(
    reference: Tensors,
    actual: Tensors,
    bounds: Mapping[str, Bound],
    *,
    rows: Rows,
    floor: Floor | None = None,
    seed: int = 0,
) -> Verdict:
    """Compare outputs of a target with the reference: names, dtypes, shapes, finiteness, then every metric.

    Args:
        reference: by output name, [n, d] float arrays; rows without a token hold zeros.
        actual: the same names, dtypes and shapes, or the verdict is ``fail``.
        bounds: a bound for each gate.
        rows: labels and token-less rows; these must be zeros in ``actual`` and take no part in the metrics.
        floor: of legitimate runs, for the order of neighbours, and for systematic errors if ``bounds`` has theirs.
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
    kept = rows.kept()
    if not reference or not kept:
        return Verdict("inconclusive", "nothing to compare: no output, or no row with a token", planned=planned)
    missing = [name for name in GATES if name not in bounds]
    if missing:
        return Verdict("inconclusive", without_bound(missing, floor), planned=planned)
    judged: list[Judged] = []
    for name in sorted(reference):
        judged += _judge(name, reference[name], actual[name], bounds, rows, kept, floor, seed)
    return _conclude(judged, planned, compared=len(reference) * len(rows.labels))


def without_bound(missing: Sequence[str], floor: Floor | None) -> str:
    """Say why there is no verdict without bounds, and what to do."""
    remedy = "give one with its reason in the case's tolerance"
    text = f"no sound bound for {', '.join(missing)}: {remedy}"
    if floor is None:
        return text
    if not np.isfinite([value for values in floor.errors.values() for value in values]).all():
        return f"the original model itself gives NaN or infinity in {floor.profile}; {text}"
    if floor.profile == "fp32":
        return (
            "runs of the original model in fp32 are off by more than rounding explains, as those of a model that draws"
            f" random numbers are; {text}"
        )
    return f"legitimate runs in {floor.profile} are so far off that anything would pass; {text}"


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
    floor: Floor | None,
    seed: int,
) -> list[Judged]:
    wanted, got = (reference, actual) if not rows.tokenless else (reference[kept], actual[kept])
    errors = row_errors(wanted, got)
    found = [worst_row(metric, getattr(errors, metric)) for metric in ROW_GATES]
    worst = worst_row("mean_abs", errors.mean_abs)
    found.append(Metric("mean_abs", float(errors.mean_abs.mean()), worst.worst))
    if len(kept) >= 3:
        usual = bounds["rel_l2"].floor
        noise = bounds["rel_l2"].value / NOISE_SHARE if usual is None else max(usual, LEAST["rel_l2"] / 10)
        found += neighbour_metrics(wanted, got, noise=noise, seed=seed)
    judged = []
    for metric in found:
        row = kept[metric.worst["row"]]
        place = {**metric.worst, "row": row, "text": rows.labels[row]}
        if metric.name == "max_abs_rms":
            place["column"] = int(np.argmax(np.abs(actual[row].astype(np.float64) - reference[row])))
        judged.append(Judged(Metric(f"{name}.{metric.name}", metric.value, place), bounds.get(metric.name)))
    if floor is not None and set(STRAYS) <= set(bounds):
        measured = range(len(actual)) if floor.rows is None else floor.rows.tolist()
        places = [(at, row) for at, row in enumerate(measured) if row not in rows.tokenless]
        center, mine = floor.center[name][[at for at, _ in places]], actual[[row for _, row in places]]
        common = systematic(center, mine)
        judged += [Judged(replace(metric, name=f"{name}.{metric.name}"), bounds[metric.name]) for metric in common]
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
    worst = item.metric.worst
    if "row" not in worst:
        return f"{text}, over all {worst['rows']} rows"
    return f"{text}, worst row {worst['row']} ({worst['text']!r})"
