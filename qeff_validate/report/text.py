# SPDX-License-Identifier: Apache-2.0
"""The report as text for terminals and notebooks: a table, the problems, and what was proved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qeff_validate.report.timings import is_timing, timing_closing

if TYPE_CHECKING:
    from rich.table import Table

MARKS: Mapping[str, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "error": "bold magenta",
    "not_run": "dim",
}


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"


HEAD = ("case", "runtime", "precision", "status", "nearest bound", "worst row", "rows", "faults", "ms/run", "rows/s")


def row_cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a plain result under `HEAD`."""
    gates = [m for m in result["metrics"] if m["bound"] or not m["passed"]]
    worst = max(gates, key=nearness, default=None)
    times, power = result["timings_s"], result["power"]
    name = result["runtime"] + (" (simulated)" if result["simulated"] else "")
    coverage = result["coverage"]
    return (
        result["case"],
        name,
        result["precision"] or "",
        result["status"],
        _beside_bound(worst) if worst else "",
        _place(worst["worst"]) if worst else "",
        f"{coverage['compared']}/{coverage['planned']}" if coverage["planned"] and not is_timing(result) else "",
        f"{power['caught']}/{power['tried']}" if power else "",
        f"{times['median_run'] * 1e3:.1f}" if "median_run" in times else "",
        f"{times['rows_per_s']:.0f}" if "rows_per_s" in times else "",
    )


def nearness(metric: Mapping[str, Any]) -> tuple[bool, float]:
    """Return what sorts a gate of a plain result by: gates that failed come last, then by value over bound."""
    value, bound = float(metric["value"]), float(metric["bound"])
    ratio = value / bound if bound else math.inf if value else 0.0
    return not metric["passed"], math.inf if math.isnan(ratio) else ratio


def _beside_bound(metric: Mapping[str, Any]) -> str:
    """Say of a gate: value, bound, and what is usual where that was measured."""
    text = f"{metric['name'].rpartition('.')[2]} {_number(metric['value'])} of {_number(metric['bound'])}"
    return f"{text} (floor {_number(metric['floor'])})" if metric["floor"] else text


def _place(worst: Mapping[str, Any]) -> str:
    return f"{worst['row']}: {worst['text'][:24]!r}" if "row" in worst else "all rows"


def table(plain: Mapping[str, Any]) -> Table:
    """Return a rich table of the results."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(*HEAD, box=None, header_style="bold", pad_edge=False)
    for result in plain["results"]:
        cells = [escape(cell) for cell in row_cells(result)]
        cells[3] = f"[{MARKS[result['status']]}]{cells[3]}[/]"
        made.add_row(*cells)
    return made


def problems(plain: Mapping[str, Any]) -> list[str]:
    """Return a line for every result that did not pass, with its reason, and for every finding and note."""
    lines = []
    for result in plain["results"]:
        head = f"{result['case']}-{result['runtime']}"
        if result["status"] != "pass":
            stage = f" at {result['stage']}" if result["stage"] else ""
            known = f" (expected: {result['expected']})" if result["expected"] else ""
            lines.append(f"{head}: {result['status']}{stage}{known}: {result['reason']}")
        lines += [f"{head}: finding: {finding}" for finding in result.get("findings", ())]
        lines += [f"{head}: note: {note}" for note in result["notes"]]
    return lines + list(plain.get("unwritten", ()))


def closing(plain: Mapping[str, Any]) -> list[str]:
    """Return sentences that say what was proved and what was not."""
    timed = list(timing_closing(plain["results"]))
    results = [result for result in plain["results"] if not is_timing(result)]
    if timed and not results:
        return timed
    unsettled = {(result["case"], result["runtime"]) for result in results if result["status"] == "error"}
    lines = timed
    for (runtime, simulated), group in _groups(results).items():
        passed = [result for result in group if result["status"] == "pass"]
        held = [result for result in passed if result["reference"] == "itself"]
        if held:
            lines.append(f"Held: {len(held)} relations between runs of {runtime}{' (simulated)' if simulated else ''}.")
        good = [result for result in passed if result["reference"] != "itself"]
        good = [result for result in good if (result["case"], result["runtime"]) not in unsettled]
        if not good:
            continue
        rows = sum(result["coverage"]["compared"] for result in good)
        where = f"{runtime}, a simulated AI 100," if simulated else runtime
        precisions = "/".join(sorted({result["precision"] for result in good}))
        cases = ", ".join(result["case"] for result in good)
        lines.append(f"Proved: {where} agrees with Hugging Face within {precisions} bounds on {rows} rows: {cases}.")
    bad = [r for r in results if r["status"] in ("fail", "inconclusive", "error")]
    if bad:
        names = ", ".join(
            f"{r['case']}-{r['runtime']} ({'expected ' if r['expected'] else ''}{r['status']})" for r in bad
        )
        lines.append(f"Not proved: {names}.")
    real = [r for r in results if r["runtime"] == "ai100" and r["status"] == "pass"]
    if not real:
        lines.append(
            "Not proved: anything on a real AI 100 card; none took part."
            + (" The simulator rounds to the card's precision on a CPU; it is no card." if _simulated(results) else "")
        )
    return lines


def _simulated(results: Iterable[Mapping[str, Any]]) -> bool:
    return any(result["simulated"] for result in results)


def _groups(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, bool], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["runtime"], result["simulated"]), []).append(result)
    return groups
