# SPDX-License-Identifier: Apache-2.0
"""The comparison of named arrays: structure first, then numbers; the worst row decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import LEAST, SYSTEMATIC_ERRORS, Bound, missing_bounds_reason, nan_max
from qeff_validate.comparison.metric import MOST_ROW_ERRORS, ErrorsByRow, Metric
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.vector_metrics import (
    GATES,
    neighbour_metrics,
    row_errors,
    systematic_metrics,
    systematic_size,
    worst_row,
)
from qeff_validate.tensors import Array, Tensors

Status = Literal["pass", "fail", "inconclusive", "error", "not_run"]


NON_FINITE = "non_finite"
"""Suffix of the gate that counts values that are not finite."""


NAMED, MOST_LISTED = 5, 100
"""Maximum number of rows in a message, and in a report."""


MOST_TEXT = 60
"""Maximum number of characters of a row's text beside its error."""


@dataclass(frozen=True, slots=True)
class RowText:
    """A text, and the number of consecutive rows that are its: its vectors, or the tokens after it."""

    text: str
    rows: int = 1


def row_texts(texts: Sequence[tuple[str, int]]) -> tuple[RowText, ...]:
    """Return the texts of rows, cut to `MOST_TEXT` characters; none at all if there are more than `MOST_ROW_ERRORS`.

    Args:
        texts: each with its number of rows, in the order of the rows.
    """
    if len(texts) > MOST_ROW_ERRORS:
        return ()
    cut = [text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…" for text, _ in texts]
    return tuple(RowText(text, rows) for text, (_, rows) in zip(cut, texts, strict=True))


@dataclass(frozen=True, slots=True)
class GateResult:
    """A metric with its bound; without a bound it is informative only."""

    metric: Metric
    bound: Bound | None

    @property
    def passed(self) -> bool:
        """True if there is no bound or the value is within it; NaN fails."""
        return self.bound is None or 0 <= self.metric.value <= self.bound.value


@dataclass(frozen=True, slots=True)
class Power:
    """Which faults the bounds of a verdict would detect.

    Attributes:
        tried: number of faults that were applied to the original model and exceed its noise.
        missed: names of those that no bound detects.
        gross: the missed faults that are too severe for any release.
    """

    tried: int
    missed: tuple[str, ...] = ()
    gross: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """All measurements for one (case, runtime), and the resulting status."""

    status: Status
    reason: str
    metrics: tuple[GateResult, ...] = ()
    planned: int = 0
    compared: int = 0
    power: Power | None = None
    findings: tuple[str, ...] = ()
    """Observations for the reader that no gate depends on."""
    texts: tuple[RowText, ...] = ()
    """The texts of the rows in order; empty if they are more than a report keeps."""

    def with_power(self, power: Power, accepted: str = "") -> Verdict:
        """Return the verdict with its power; a pass becomes inconclusive if the bounds miss a gross fault.

        Args:
            power: what the bounds find.
            accepted: why a case accepts bounds that miss such a fault; it becomes a finding.
        """
        if self.status != "pass" or not power.gross:
            return replace(self, power=power)
        if accepted:
            told = f"the bounds would let {', '.join(map(repr, power.gross))} pass, which the case accepts: {accepted}"
            return replace(self, power=power, findings=(*self.findings, told))
        reason = (
            f"these bounds would let {', '.join(map(repr, power.gross))} pass, which nobody may ship: give more or"
            " longer rows, tighter bounds of the case's own, or a precision with less noise; or say why this is"
            " accepted with accept_low_power: REASON in the tolerance"
        )
        return replace(self, status="inconclusive", reason=reason, power=power)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an output.

    Attributes:
        labels: one per row, for messages.
        tokenless: indices of rows without a token.
        zeros: token-less rows must be zeros, as our own export pools them; else their content is only a finding.
        reached: indices of rows that change with the content of a token-less row in their batch.
    """

    labels: Sequence[str]
    tokenless: frozenset[int] = field(default_factory=frozenset)
    zeros: bool = True
    reached: Sequence[int] = ()

    def with_tokens(self) -> list[int]:
        """Return the indices of the rows with at least one token."""
        return [row for row in range(len(self.labels)) if row not in self.tokenless]

    def gated(self) -> list[int]:
        """Return the indices of the rows that a verdict depends on."""
        return list(range(len(self.labels))) if self.zeros else self.with_tokens()


def worst_errors(reference: Tensors, outputs: Tensors, rows: Rows) -> dict[str, float]:
    """Return the worst value of each row metric over all outputs and all rows with a token; NaN if any value is NaN."""
    places = rows.with_tokens()
    errors = [row_errors(array[places], outputs[name][places]) for name, array in reference.items()]
    return {name: nan_max(worst_row(name, getattr(output, name)).value for output in errors) for name in LEAST}


def systematic_errors(center: Tensors, outputs: Tensors, rows: Rows) -> dict[str, float]:
    """Return the systematic errors of outputs against their mean over runs, from all rows with a token."""
    places = rows.with_tokens()
    sizes: dict[str, list[float]] = {name: [] for name in SYSTEMATIC_ERRORS}
    for name, array in center.items():
        for metric in systematic_metrics(array[places], outputs[name][places]):
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
    similarity: str = "cosine",
) -> Verdict:
    """Compare the outputs of a runtime with the reference: names, dtypes, shapes, finiteness, then every metric.

    A row that is not finite fails on its own gate; the other metrics are taken over the remaining rows.

    Args:
        reference: by output name, [n, d] float arrays; rows without a token hold zeros.
        actual: must have the same names, dtypes and shapes, or the verdict is ``fail``.
        bounds: by metric.
        rows: labels and token-less rows; the latter are excluded from the metrics.
        floor: noise floor, for systematic errors if ``bounds`` has their bounds.
        seed: for sampling the rows of pairwise metrics.
        precision: profile of what computed ``actual``, for messages.
        relation: ``reference`` is an output of the same session, so a row that is not finite in it fails as well.
        similarity: by which neighbours are ordered (`similarity.SIMILARITIES`).
    """
    planned = len(reference) * len(rows.gated())
    problem = structure_problem(reference, actual, len(rows.labels))
    if problem:
        return Verdict("fail", problem, planned=planned)
    if not reference or not rows.with_tokens():
        return Verdict("inconclusive", "nothing to compare: no output, or no row with a token", planned=planned)
    results: list[GateResult] = []
    findings: list[str] = []
    unusable: dict[str, list[int]] = {}
    for name in sorted(reference):
        wanted, got = finite_rows(reference[name]), finite_rows(actual[name])
        usable = np.ones_like(got) if relation else wanted
        unusable[name] = [row for row in rows.gated() if not usable[row]]
        broken = [row for row in rows.gated() if usable[row] and not (got[row] and wanted[row])]
        both = actual[name] if not relation else np.where(got[:, None], reference[name], actual[name])
        results += non_finite(name, both, broken, rows)
        measured = [row for row in rows.with_tokens() if wanted[row] and got[row]]
        if measured:
            arrays = reference[name], actual[name]
            results += _gate_output(name, *arrays, bounds, rows, measured, floor, seed, similarity)
        if rows.tokenless and rows.zeros:
            results.append(_tokenless_gate(name, actual[name], rows))
        elif rows.tokenless:
            findings += _filler_findings(name, actual[name], rows)
    results += _reached_gate(rows)
    verdict = _conclude(results, planned, compared=planned - sum(map(len, unusable.values())))
    missing = [name for name in GATES if name not in bounds]
    if missing and verdict.status != "fail":
        verdict = replace(verdict, status="inconclusive", reason=missing_bounds_reason(missing, floor, precision))
    verdict = replace(verdict, findings=tuple(findings), texts=row_texts([(label, 1) for label in rows.labels]))
    return with_unusable_rows(verdict, unusable, rows.labels)


def finite_rows(array: Array) -> NDArray[np.bool_]:
    """Return which rows of ``[n, d]`` hold finite values only, bool ``[n]``."""
    with np.errstate(all="ignore"):
        # the sum is NaN or infinite if any element is; finite float32 values cannot overflow a float64 sum
        finite: NDArray[np.bool_] = np.isfinite(np.sum(array, axis=1, dtype=np.float64))
    return finite


def with_unusable_rows(verdict: Verdict, unusable: Mapping[str, Sequence[int]], labels: Sequence[str]) -> Verdict:
    """Return the verdict with the rows named in which the reference is not finite; it never passes if there are any."""
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
    """Return indices and labels of rows for a message, limited to the first `NAMED`."""
    names = ", ".join(f"row {row} ({labels[row]!r})" for row in places[:NAMED])
    return f"{names} and {len(places) - NAMED} more" if len(places) > NAMED else names


def structure_problem(reference: Tensors, actual: Tensors, n: int) -> str | None:
    """Return how names, dtypes or shapes differ; None if they match and there are n rows."""
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
    """Return the failed gate of rows that are not finite; empty if there are none.

    Args:
        name: of the output.
        array: ``[n, d]``.
        places: indices of the rows that are not finite.
        rows: labels, and the rows that a verdict depends on.
    """
    if not places:
        return []
    row = places[0]
    worst = {
        "row": row,
        "column": int(np.argmin(np.isfinite(array[row]))),
        "text": rows.labels[row],
        "rows": len(places),
        "of_rows": len(rows.gated()),
        "of_values": len(rows.gated()) * array.shape[1],
        "others": [{"row": other, "text": rows.labels[other]} for other in places[1:MOST_LISTED]],
    }
    count = float(sum(np.count_nonzero(~np.isfinite(array[place])) for place in places))
    return [GateResult(Metric(f"{name}.{NON_FINITE}", count, worst), Bound(0.0, "exact", "every value must be finite"))]


def _gate_output(
    name: str,
    reference: Array,
    actual: Array,
    bounds: Mapping[str, Bound],
    rows: Rows,
    measured: list[int],
    floor: Floor | None,
    seed: int,
    similarity: str,
) -> list[GateResult]:
    complete = len(measured) == len(reference)
    wanted, got = (reference, actual) if complete else (reference[measured], actual[measured])
    errors = row_errors(wanted, got)
    metrics = [worst_row(metric, getattr(errors, metric)) for metric in LEAST]
    worst = worst_row("mean_abs", errors.mean_abs)
    metrics.append(Metric("mean_abs", float(errors.mean_abs.mean()), worst.worst))
    if len(measured) >= 3 and "rel_l2" in bounds:
        bound = bounds["rel_l2"]
        noise = nan_max((bound.noise, LEAST["rel_l2"] / 10)) if bound.source == "floor" else bound.noise
        metrics += neighbour_metrics(wanted, got, noise=noise, seed=seed, by=similarity)
    results = []
    for metric in metrics:
        row = measured[metric.worst["row"]]
        place = {**metric.worst, "row": row, "text": rows.labels[row]}
        if metric.name == "max_abs_rms":
            place["column"] = int(np.argmax(np.abs(actual[row].astype(np.float64) - reference[row])))
        errors_by_row = metric.by_row and ErrorsByRow.of(metric.by_row.values, measured, len(reference))
        placed = Metric(f"{name}.{metric.name}", metric.value, place, errors_by_row)
        results.append(GateResult(placed, bounds.get(metric.name)))
    floor_rows = np.arange(len(actual)) if floor is None or floor.rows is None else floor.rows
    places = np.flatnonzero(np.isin(floor_rows, measured))
    if floor is not None and set(SYSTEMATIC_ERRORS) <= set(bounds) and places.size:
        systematic = systematic_metrics(floor.center[name][places], actual[floor_rows[places]])
        results += [
            GateResult(replace(metric, name=f"{name}.{metric.name}"), bounds[metric.name]) for metric in systematic
        ]
    return results


def _tokenless_gate(name: str, actual: Array, rows: Rows) -> GateResult:
    places = sorted(rows.tokenless)
    worst = places[int(np.argmax([np.max(np.abs(actual[row])) for row in places]))]
    count = float(sum(np.count_nonzero(actual[row]) for row in places))
    metric = Metric(f"{name}.tokenless_rows", count, {"row": worst, "text": rows.labels[worst], "rows": len(places)})
    return GateResult(metric, Bound(0.0, "exact", "a row without a token pools to zeros"))


def _filler_findings(name: str, actual: Array, rows: Rows) -> list[str]:
    """Report rows without a token that are not zeros; such rows only fill a batch, so no gate applies."""
    places = sorted(rows.tokenless)
    groups = {
        "are not finite": [row for row in places if not np.isfinite(actual[row]).all()],
        "are not zeros": [row for row in places if np.isfinite(actual[row]).all() and actual[row].any()],
    }
    effect = "change with them" if rows.reached else "do not change with them"
    return [
        f"{name}: {len(group)} of {len(places)} rows without a token {what} ({named_rows(group, rows.labels)});"
        f" such rows only fill a batch and are not judged; other rows of their batch {effect}"
        for what, group in groups.items()
        if group
    ]


def _reached_gate(rows: Rows) -> list[GateResult]:
    """Return the failed gate of rows that change with a token-less row of their batch; empty if there are none."""
    if not rows.reached:
        return []
    row = rows.reached[0]
    metric = Metric("rows.changed_by_filler", float(len(rows.reached)), {"row": row, "text": rows.labels[row]})
    why = "a row is the same bit for bit, whatever fills the batch beside it"
    return [GateResult(metric, Bound(0.0, "exact", why))]


def rows_beyond(reference: Tensors, actual: Tensors, bounds: Mapping[str, Bound], rows: Rows) -> set[int]:
    """Return the rows with a token that exceed a bound or are not finite, of those whose reference is finite."""
    beyond: set[int] = set()
    places = np.array(
        [row for row in rows.with_tokens() if all(finite_rows(array)[row] for array in reference.values())], int
    )
    if not places.size:
        return beyond
    for name, array in reference.items():
        errors = row_errors(array[places], actual[name][places])
        for gate in LEAST:
            if gate in bounds:
                beyond |= set(places[~(getattr(errors, gate) <= bounds[gate].value)].tolist())
        beyond |= set(places[~finite_rows(actual[name])[places]].tolist())
    return beyond


def _conclude(results: list[GateResult], planned: int, compared: int) -> Verdict:
    failed = [item for item in results if not item.passed]
    gates = {item.metric.name.rpartition(".")[2] for item in results if item.bound is not None}
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
    return Verdict(status, reason, tuple(results), planned, compared)


def with_gates(
    verdict: Verdict,
    results: Sequence[GateResult],
    required: Sequence[str],
    *,
    floor: Floor | None = None,
    precision: str = "",
) -> Verdict:
    """Return a verdict with further gates.

    Args:
        verdict: of `compare`.
        results: measurements of further metrics.
        required: names of metrics that must have a bound; a pass becomes inconclusive if one has none.
        floor: noise floor that the bounds come from, for messages.
        precision: profile of the artifact, for messages.
    """
    verdict = replace(verdict, metrics=(*verdict.metrics, *results))
    failed = [item for item in results if not item.passed]
    if failed:
        reasons = (verdict.reason if verdict.status == "fail" else "", *map(sentence, failed))
        return replace(verdict, status="fail", reason="; ".join(filter(None, reasons)))
    gated = {item.metric.name.rpartition(".")[2] for item in results if item.bound is not None}
    missing = [name for name in required if name not in gated]
    if missing and verdict.status == "pass":
        return replace(verdict, status="inconclusive", reason=missing_bounds_reason(missing, floor, precision))
    return verdict


def verdict_of_gates(results: Sequence[GateResult], planned: int) -> Verdict:
    """Return the verdict of gates over all planned rows: ``pass`` if every gate holds."""
    failed = [item for item in results if not item.passed]
    status: Status = "fail" if failed else "pass"
    return Verdict(status, "; ".join(map(sentence, failed)), tuple(results), planned, planned)


def sentence(item: GateResult) -> str:
    """Describe a failed gate: name, value, bound and the worst row."""
    assert item.bound is not None  # only gates fail
    if item.metric.name.endswith(f".{NON_FINITE}"):
        return _non_finite_sentence(item.metric)
    text = f"{item.metric.label} {item.metric.value:.3g}, allowed {item.bound.value:.3g} ({item.bound.source})"
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
