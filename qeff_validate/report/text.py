# SPDX-License-Identifier: Apache-2.0
"""The report as text for terminals and notebooks: a table, the problems, and what was proved."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qeff_validate.comparison.verdict import GateResult
from qeff_validate.report.result import Result
from qeff_validate.report.timings import IN_TIME, NOT_IN_TIME, is_timing, timing_closing

if TYPE_CHECKING:
    from rich.table import Table

MARKS: Mapping[str, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "error": "bold magenta",
    "not_run": "dim",
}


PROVED, HELD, NOT_PROVED = "Proved", "Held", "Not proved"
"""What is said of a result that passes: against the original model, against itself, within a wide bound of the case."""

DISPROVED, NOT_SETTLED, NOT_RUN = "Disproved", "Not settled", "Not run"
"""What is said of other results."""

TASK_DATA = "Task data"
"""What is said of the numbers on task data, which stand beside a verdict."""

HEAD = ("case", "runtime", "precision", "status", "nearest bound", "worst row", "rows", "faults", "ms/run", "rows/s")

NARROW = (0, 1, 3, 4, 6)
"""Columns of `HEAD` for a terminal of 80 columns."""

NARROW_BELOW = 130
"""Width in columns from which a table has all columns."""


def _number(value: float) -> str:
    """Return a count as a whole number, another value with three digits and an exponent."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.2e}"


def row_cells(result: Result) -> tuple[str, ...]:
    """Return the cells of a result under `HEAD`."""
    # an exact bound that holds is at no distance: it is the nearest only where there is no other
    nearest = max(result.gates, key=nearness, default=None)
    times, power = result.timings_s, result.power
    return (
        result.case,
        runtime_name(result),
        result.precision or "",
        result.status,
        _beside_bound(nearest) if nearest else "",
        _place(nearest.metric.worst) if nearest else "",
        f"{result.compared}/{result.planned}" if result.planned and not is_timing(result) else "",
        f"{power.tried - len(power.missed)}/{power.tried}" if power else "",
        f"{times['median_run'] * 1e3:.1f}" if "median_run" in times else "",
        f"{times['rows_per_s']:.0f}" if "rows_per_s" in times else "",
    )


def nearness(item: GateResult) -> tuple[bool, float]:
    """Return what a gate is sorted by: those that failed come last, then by value over bound."""
    value, bound = item.metric.value, item.bound.value if item.bound else math.inf
    ratio = value / bound if bound else math.inf if value else -1.0
    return not item.passed, math.inf if math.isnan(ratio) else ratio


def _beside_bound(item: GateResult) -> str:
    """Return value and bound."""
    assert item.bound is not None
    name = item.metric.label.rpartition(".")[2]
    return f"{name} {_number(item.metric.value)} of {_number(item.bound.value)}"


def _place(worst: Mapping[str, Any]) -> str:
    return f"{worst['row']}: {worst['text'][:24]!r}" if "row" in worst else "all rows"


def table(results: Sequence[Result], *, width: int | None = None) -> Table:
    """Return a rich table of the results; with a width below `NARROW_BELOW` of fewer columns, whose cells wrap."""
    from rich.markup import escape
    from rich.table import Table

    columns = NARROW if width is not None and width < NARROW_BELOW else tuple(range(len(HEAD)))
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        rows.add_column(HEAD[column], overflow="fold")
    for result in results:
        cells = [escape(cell) for cell in row_cells(result)]
        cells[3] = f"[{MARKS[result.status]}]{cells[3]}[/]"
        rows.add_row(*(cells[column] for column in columns))
    return rows


def problems(results: Sequence[Result]) -> list[str]:
    """Return a line for every result that did not pass, with its reason, and for every finding and note."""
    lines = []
    for result, runtimes in distinct_problems(results):
        stage = f" at {result.stage}" if result.stage else ""
        known = f" (expected: {result.expected})" if result.expected else ""
        names = ", ".join(f"{result.case}-{runtime}" for runtime in runtimes)
        lines.append(f"{names}: {result.status}{stage}{known}: {listed_reason(result)}")
    return lines + remarks(results)


def listed_reason(result: Result) -> str:
    """Return the reason; that of a failure has a line for each metric beyond its bound."""
    return result.reason.replace("; ", ";\n  ") if result.status == "fail" else result.reason


def distinct_problems(results: Sequence[Result]) -> Iterator[tuple[Result, list[str]]]:
    """Yield each problem once: the first result that has it, and the runtimes of all that have it."""
    found: dict[tuple[str | None, ...], tuple[int, list[str]]] = {}
    for place, result in enumerate(results):
        if result.status != "pass":
            found.setdefault(_problem(result), (place, []))[1].append(result.runtime)
    for place, runtimes in found.values():
        yield results[place], runtimes


def remarks(results: Sequence[Result]) -> list[str]:
    """Return a line for every finding and note."""
    lines = []
    for result in results:
        head = f"{result.case}-{result.runtime}"
        lines += [f"{head}: finding: {finding}" for finding in result.findings]
        lines += [f"{head}: note: {note}" for note in result.notes]
    return lines


class _Said(NamedTuple):
    """What the closing sentences need of a result that is no timing."""

    case: str
    runtime: str
    simulated: bool
    status: str
    expected: bool
    precision: str
    rows: int
    to_itself: bool
    own_terms: str

    @property
    def name(self) -> str:
        return f"{self.case}-{self.runtime}"


def _said(result: Result) -> _Said:
    return _Said(
        result.case,
        result.runtime,
        result.simulated,
        result.status,
        bool(result.expected),
        str(result.precision),
        result.compared,
        result.reference == "itself",
        own_terms(result) if result.status == "pass" else "",
    )


def closing(results: Sequence[Result]) -> list[str]:
    """Return sentences that say what was proved and what was not."""
    timed = list(timing_closing(results))
    said = [_said(result) for result in results if not is_timing(result)]
    if timed and not said:
        return timed
    unsettled = unsettled_places(results)
    lines = timed
    for (runtime, simulated), group in _groups(said).items():
        passed = [item for item in group if item.status == "pass"]
        held = sum(item.to_itself for item in passed)
        if held:
            lines.append(f"{HELD}: {held} relations between runs of {runtime}{' (simulated)' if simulated else ''}.")
        good = [item for item in passed if not item.to_itself and not item.own_terms]
        good = [item for item in good if (item.case, item.runtime) not in unsettled]
        if not good:
            continue
        rows = sum(item.rows for item in good)
        where = f"{runtime}, a simulated AI 100," if simulated else runtime
        precisions = "/".join(dict.fromkeys(item.precision for item in good))
        cases = ", ".join(item.case for item in good)
        lines.append(f"{PROVED}: {where} agrees with Hugging Face within {precisions} bounds on {rows} rows: {cases}.")
    lines += [f"{NOT_PROVED}: {item.name} passes {item.own_terms}." for item in said if item.own_terms]
    for word, statuses in ((DISPROVED, ("fail",)), (NOT_SETTLED, ("inconclusive", "error"))):
        names = [
            f"{item.name} ({'expected ' if item.expected else ''}{item.status})"
            for item in said
            if item.status in statuses
        ]
        lines += [f"{word}: {', '.join(names)}."] if names else []
    if not any(item.runtime == "ai100" and item.status == "pass" for item in said):
        lines.append(
            f"{NOT_PROVED}: anything on a real AI 100 card; none took part."
            + (
                " The simulator rounds to the card's precision on a CPU; it is no card."
                if any(item.simulated for item in said)
                else ""
            )
        )
    return [*lines, *task_lines(results), *explanations(results)]


def task_lines(results: Iterable[Result]) -> list[str]:
    """Return a sentence for each result with task data: what it reaches there, beside its verdict."""
    return [
        f"{TASK_DATA}: {result.case}-{runtime_name(result)} ({result.status}): {result.task}."
        for result in results
        if result.task is not None
    ]


def explanations(results: Iterable[Result]) -> list[str]:
    """Return a sentence for each result that was explained: where it goes wrong."""
    return [
        f"{result.case}-{result.runtime}: {result.explanation.summary}"
        for result in results
        if result.explanation is not None
    ]


def unsettled_places(results: Iterable[Result]) -> set[tuple[str, str]]:
    """Return case and runtime of results that end with an error, where nothing is called proved."""
    return {(result.case, result.runtime) for result in results if result.status == "error" and not is_timing(result)}


def status_word(result: Result, unsettled: Collection[tuple[str, str]] = ()) -> str:
    """Return the word that the closing sentences say of a result, such as ``Proved`` or ``Not settled``.

    Args:
        result: of a report.
        unsettled: `unsettled_places` of the report.
    """
    if result.status == "not_run":
        return NOT_RUN
    if is_timing(result):
        return IN_TIME if result.status == "pass" else NOT_IN_TIME
    if result.status != "pass":
        return DISPROVED if result.status == "fail" else NOT_SETTLED
    if result.reference == "itself":
        return HELD
    if (result.case, result.runtime) in unsettled:
        return NOT_SETTLED
    return NOT_PROVED if own_terms(result) else PROVED


def runtime_name(result: Result) -> str:
    """Return the name of a result's runtime, which says so if it is simulated."""
    return result.runtime + (" (simulated)" if result.simulated else "")


def _problem(result: Result) -> tuple[str | None, ...]:
    """Return what makes two problems the same one, which is told once for all runtimes."""
    return result.case, result.status, result.stage, result.expected, result.reason


def own_terms(result: Result) -> str:
    """Return within which bounds of the case's own a result passes, and what they would let through; empty if none."""
    own = [item for item in result.gates if item.bound is not None and item.bound.source == "case"]
    if not own or result.reference == "itself":
        return ""
    bounds = [
        f"{item.metric.label.rpartition('.')[2]} <= {item.bound.value:g}{_times_noise(item)}"
        for item in own
        if item.bound
    ]
    reasons = "; ".join(dict.fromkeys(item.bound.why for item in own if item.bound))
    text = f"within the case's own bound {', '.join(bounds)} (why: {reasons})"
    power = result.power
    return f"{text}; {len(power.missed)} of {power.tried} faults would pass" if power else text


def _times_noise(item: GateResult) -> str:
    floor = item.bound.floor if item.bound else None
    return f", {item.bound.value / floor:,.0f} x the noise" if item.bound and floor else ""


def _groups(said: Iterable[_Said]) -> dict[tuple[str, bool], list[_Said]]:
    groups: dict[tuple[str, bool], list[_Said]] = {}
    for item in said:
        groups.setdefault((item.runtime, item.simulated), []).append(item)
    return groups


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested plain data, each under the names that lead to it."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, str):
            yield name, value
        elif isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            yield name, " ".join(value)
        else:
            yield name, json.dumps(value, ensure_ascii=False, default=str)
