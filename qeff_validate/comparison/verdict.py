# SPDX-License-Identifier: Apache-2.0
"""The comparison of named arrays: structure first, then numbers; the worst row decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import LEAST, NOISE_SHARE, SYSTEMATIC_ERRORS, Bound, missing_bounds_reason, nan_max
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.vector_metrics import (
    GATES,
    Metric,
    neighbour_metrics,
    row_errors,
    systematic_metrics,
    systematic_size,
    worst_row,
)
from qeff_validate.tensors import Array, Tensors

Status = Literal["pass", "fail", "inconclusive", "error", "not_run"]


NON_FINITE = "non_finite"
"""End of the name of the gate that counts values which are not finite."""


NAMED, MOST_LISTED = 5, 100
"""So many rows are named in a message, and listed in a report."""


@dataclass(frozen=True, slots=True)
class GateResult:
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
    metrics: tuple[GateResult, ...] = ()
    planned: int = 0
    compared: int = 0
    power: Power | None = None
    findings: tuple[str, ...] = ()
    """What a reader should know and no gate depends on."""

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
    """What the rows of an output are.

    Attributes:
        labels: one for each row, for messages.
        tokenless: rows that hold no token.
        zeros: token-less rows must be zeros, as our own wrapper pools them; else what they hold is a finding.
        reached: rows that change with the content of a token-less row in their batch.
    """

    labels: Sequence[str]
    tokenless: frozenset[int] = field(default_factory=frozenset)
    zeros: bool = True
    reached: Sequence[int] = ()

    def kept(self) -> list[int]:
        """Return the rows that hold a token."""
        return [row for row in range(len(self.labels)) if row not in self.tokenless]

    def judged(self) -> list[int]:
        """Return the rows that a verdict depends on."""
        return list(range(len(self.labels))) if self.zeros else self.kept()


def worst_errors(reference: Tensors, outputs: Tensors, rows: Rows) -> dict[str, float]:
    """Return the worst value of each row metric of outputs, over all rows that hold a token; NaN if one is NaN."""
    kept = rows.kept()
    errors = [row_errors(array[kept], outputs[name][kept]) for name, array in reference.items()]
    return {name: nan_max(worst_row(name, getattr(each, name)).value for each in errors) for name in LEAST}


def systematic_errors(center: Tensors, outputs: Tensors, rows: Rows) -> dict[str, float]:
    """Return the systematic parts of outputs' errors, over all rows that hold a token."""
    kept = rows.kept()
    sizes: dict[str, list[float]] = {name: [] for name in SYSTEMATIC_ERRORS}
    for name, array in center.items():
        for metric in systematic_metrics(array[kept], outputs[name][kept]):
            sizes[metric.name].append(systematic_size(metric))
    return {name: nan_max(values) for name, values in sizes.items()}


def compare(
    reference: Tensors,
    actual: Tensors,
    bounds: Mapping[str, Bound],
    *,
    rows: Rows,
    floor: Floor | None = None,
    seed: int = 0,
    precision: str = "",
    relation: bool = False,
) -> Verdict:
    """Compare outputs of a target with the reference: names, dtypes, shapes, finiteness, then every metric.

    A row that is not finite fails by itself; the metrics are those of all other rows.

    Args:
        reference: by output name, [n, d] float arrays; rows without a token hold zeros.
        actual: the same names, dtypes and shapes, or the verdict is ``fail``.
        bounds: a bound for each gate.
        rows: labels and token-less rows; these take no part in the metrics.
        floor: of legitimate runs, for the order of neighbours, and for systematic errors if ``bounds`` has theirs.
        seed: draws rows for pairwise metrics.
        precision: profile of what computed ``actual``, for messages.
        relation: ``reference`` comes from the same session as ``actual``, so a row that is not finite in it fails too.
    """
    planned = len(reference) * len(rows.judged())
    problem = structure_problem(reference, actual, len(rows.labels))
    if problem:
        return Verdict("fail", problem, planned=planned)
    if not reference or not rows.kept():
        return Verdict("inconclusive", "nothing to compare: no output, or no row with a token", planned=planned)
    judged: list[GateResult] = []
    findings: list[str] = []
    unusable: dict[str, list[int]] = {}
    for name in sorted(reference):
        wanted, got = finite_rows(reference[name]), finite_rows(actual[name])
        usable = np.ones_like(got) if relation else wanted
        unusable[name] = [row for row in rows.judged() if not usable[row]]
        broken = [row for row in rows.judged() if usable[row] and not (got[row] and wanted[row])]
        both = actual[name] if not relation else np.where(got[:, None], reference[name], actual[name])
        judged += non_finite(name, both, broken, rows)
        kept = [row for row in rows.kept() if wanted[row] and got[row]]
        if kept:
            judged += _judge(name, reference[name], actual[name], bounds, rows, kept, floor, seed)
        if rows.tokenless and rows.zeros:
            judged.append(_tokenless(name, actual[name], rows))
        elif rows.tokenless:
            findings += _filler_findings(name, actual[name], rows)
    judged += _reached(rows)
    verdict = _conclude(judged, planned, compared=planned - sum(map(len, unusable.values())))
    missing = [name for name in GATES if name not in bounds]
    if missing and verdict.status != "fail":
        verdict = replace(verdict, status="inconclusive", reason=missing_bounds_reason(missing, floor, precision))
    return replace(with_unusable_rows(verdict, unusable, rows.labels), findings=tuple(findings))


def finite_rows(array: Array) -> NDArray[np.bool_]:
    """Return for each row of ``[n, d]`` whether all its values are finite, bool ``[n]``."""
    with np.errstate(all="ignore"):
        # NaN or infinite if any element is; a float64 sum of float32 values cannot overflow by itself
        finite: NDArray[np.bool_] = np.isfinite(np.sum(array, axis=1, dtype=np.float64))
    return finite


def with_unusable_rows(verdict: Verdict, unusable: Mapping[str, Sequence[int]], labels: Sequence[str]) -> Verdict:
    """Return a verdict that names the rows in which the reference itself is not finite; such a verdict never passes."""
    texts = [
        f"the reference itself holds NaN or infinity in {len(places)} of {len(labels)} rows of {name}:"
        f" {named_rows(places, labels)}"
        for name, places in unusable.items()
        if places
    ]
    if not texts:
        return verdict
    if verdict.status == "fail":
        return replace(verdict, reason="; ".join([verdict.reason, *texts]))
    return replace(verdict, status="inconclusive", reason="; ".join(filter(None, [*texts, verdict.reason])))


def named_rows(places: Sequence[int], labels: Sequence[str]) -> str:
    """Return numbers and labels of rows for a message; of many rows the first ones."""
    names = ", ".join(f"row {row} ({labels[row]!r})" for row in places[:NAMED])
    return f"{names} and {len(places) - NAMED} more" if len(places) > NAMED else names


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


def non_finite(name: str, array: Array, places: Sequence[int], rows: Rows) -> list[GateResult]:
    """Return the gate that rows break which are not finite; nothing if there are none.

    Args:
        name: of the output.
        array: ``[n, d]``.
        places: rows that are not finite.
        rows: labels, and how many rows are judged.
    """
    if not places:
        return []
    row = places[0]
    worst = {
        "row": row,
        "column": int(np.argmin(np.isfinite(array[row]))),
        "text": rows.labels[row],
        "rows": len(places),
        "of_rows": len(rows.judged()),
        "of_values": len(rows.judged()) * array.shape[1],
        "others": [{"row": other, "text": rows.labels[other]} for other in places[1:MOST_LISTED]],
    }
    count = float(sum(np.count_nonzero(~np.isfinite(array[place])) for place in places))
    return [GateResult(Metric(f"{name}.{NON_FINITE}", count, worst), Bound(0.0, "exact", "every value must be finite"))]


def _judge(
    name: str,
    reference: Array,
    actual: Array,
    bounds: Mapping[str, Bound],
    rows: Rows,
    kept: list[int],
    floor: Floor | None,
    seed: int,
) -> list[GateResult]:
    whole = len(kept) == len(reference)
    wanted, got = (reference, actual) if whole else (reference[kept], actual[kept])
    errors = row_errors(wanted, got)
    found = [worst_row(metric, getattr(errors, metric)) for metric in LEAST]
    worst = worst_row("mean_abs", errors.mean_abs)
    found.append(Metric("mean_abs", float(errors.mean_abs.mean()), worst.worst))
    if len(kept) >= 3 and "rel_l2" in bounds:
        usual = bounds["rel_l2"].floor
        noise = bounds["rel_l2"].value / NOISE_SHARE if usual is None else nan_max((usual, LEAST["rel_l2"] / 10))
        found += neighbour_metrics(wanted, got, noise=noise, seed=seed)
    judged = []
    for metric in found:
        row = kept[metric.worst["row"]]
        place = {**metric.worst, "row": row, "text": rows.labels[row]}
        if metric.name == "max_abs_rms":
            place["column"] = int(np.argmax(np.abs(actual[row].astype(np.float64) - reference[row])))
        judged.append(GateResult(Metric(f"{name}.{metric.name}", metric.value, place), bounds.get(metric.name)))
    measured = np.arange(len(actual)) if floor is None or floor.rows is None else floor.rows
    places = np.flatnonzero(np.isin(measured, kept))
    if floor is not None and set(SYSTEMATIC_ERRORS) <= set(bounds) and places.size:
        common = systematic_metrics(floor.center[name][places], actual[measured[places]])
        judged += [GateResult(replace(metric, name=f"{name}.{metric.name}"), bounds[metric.name]) for metric in common]
    return judged


def _tokenless(name: str, actual: Array, rows: Rows) -> GateResult:
    places = sorted(rows.tokenless)
    worst = places[int(np.argmax([np.max(np.abs(actual[row])) for row in places]))]
    count = float(sum(np.count_nonzero(actual[row]) for row in places))
    metric = Metric(f"{name}.tokenless_rows", count, {"row": worst, "text": rows.labels[worst], "rows": len(places)})
    return GateResult(metric, Bound(0.0, "exact", "a row without a token pools to zeros"))


def _filler_findings(name: str, actual: Array, rows: Rows) -> list[str]:
    """Say what stands in rows without a token, if it is not zeros; nobody feeds such a row, so nobody reads it."""
    places = sorted(rows.tokenless)
    groups = {
        "are not finite": [row for row in places if not np.isfinite(actual[row]).all()],
        "are not zeros": [row for row in places if np.isfinite(actual[row]).all() and actual[row].any()],
    }
    effect = "change with them" if rows.reached else "do not change with them"
    return [
        f"{name}: {len(group)} of {len(places)} rows without a token {what} ({named_rows(group, rows.labels)});"
        f" they are nobody's input and are not judged; other rows of their batch {effect}"
        for what, group in groups.items()
        if group
    ]


def _reached(rows: Rows) -> list[GateResult]:
    """Return the gate that rows break which change with a token-less row of their batch."""
    if not rows.reached:
        return []
    row = rows.reached[0]
    metric = Metric("rows.changed_by_filler", float(len(rows.reached)), {"row": row, "text": rows.labels[row]})
    why = "a row is the same bit for bit, whatever fills the batch beside it"
    return [GateResult(metric, Bound(0.0, "exact", why))]


def rows_beyond(reference: Tensors, actual: Tensors, bounds: Mapping[str, Bound], rows: Rows) -> set[int]:
    """Return the rows with a token that are beyond a bound of a row metric or not finite; the reference is finite."""
    beyond: set[int] = set()
    kept = np.array([row for row in rows.kept() if all(finite_rows(array)[row] for array in reference.values())], int)
    if not kept.size:
        return beyond
    for name, array in reference.items():
        errors = row_errors(array[kept], actual[name][kept])
        for gate in LEAST:
            if gate in bounds:
                beyond |= set(kept[~(getattr(errors, gate) <= bounds[gate].value)].tolist())
        beyond |= set(kept[~finite_rows(actual[name])[kept]].tolist())
    return beyond


def _conclude(judged: list[GateResult], planned: int, compared: int) -> Verdict:
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


def all_hold(judged: Sequence[GateResult], planned: int) -> Verdict:
    """Return a verdict on all of what was planned: ``pass`` if every gate holds."""
    failed = [item for item in judged if not item.passed]
    status: Status = "fail" if failed else "pass"
    return Verdict(status, "; ".join(map(sentence, failed)), tuple(judged), planned, planned)


def sentence(item: GateResult) -> str:
    """Say of a gate that failed: name, value, bound and the worst row."""
    assert item.bound is not None  # only gates fail
    if item.metric.name.endswith(f".{NON_FINITE}"):
        return _non_finite_sentence(item.metric)
    text = f"{item.metric.name} {item.metric.value:.3g}, allowed {item.bound.value:.3g} ({item.bound.source})"
    worst = item.metric.worst
    if "row" not in worst:
        return f"{text}, over all {worst['rows']} rows"
    return f"{text}, worst row {worst['row']} ({worst['text']!r})"


def _non_finite_sentence(metric: Metric) -> str:
    worst = metric.worst
    text = (
        f"{metric.name.rpartition('.')[0]}: {metric.value:.0f} of {worst['of_values']} values are NaN or infinite in"
        f" {worst['rows']} of {worst['of_rows']} rows; first at row {worst['row']}, column {worst['column']}"
        f" ({worst['text']!r})"
    )
    names = [f"row {other['row']} ({other['text']!r})" for other in worst["others"][: NAMED - 1]]
    more = worst["rows"] - 1 - len(names)
    return text + (f", then {', '.join(names)}" if names else "") + (f" and {more} more" if more else "")
