# SPDX-License-Identifier: Apache-2.0
"""Results, the report, and its one writer: ``report.json``, ``report.md``, a table for terminals and notebooks."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qeff_validate.compare import Judged, Power, Status
from qeff_validate.errors import ValidateError
from qeff_validate.files import temporary_beside

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
DEFAULT_DIR = "qv-report"
MARKS: Mapping[str, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "error": "bold magenta",
    "not_run": "dim",
}


@dataclass(frozen=True, slots=True)
class Rung:
    """One precheck: whether both sides of a comparison were made from the same thing.

    Attributes:
        name: one of `prechecks.checks.RUNGS`.
        state: ``differs`` only where that is certain.
        detail: both sides if they differ, why if it is unknown, a remark if it is the same.
        suspect: unknown, but worth a look if the numbers do not agree.
    """

    name: str
    state: Literal["same", "differs", "unknown"]
    detail: str = ""
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What came out for one case on one runtime."""

    case: str
    runtime: str
    status: Status
    reason: str = ""
    stage: str | None = None
    reference: str = "hf"
    precision: str | None = None
    simulated: bool = False
    metrics: tuple[Judged, ...] = ()
    planned: int = 0
    compared: int = 0
    timings_s: Mapping[str, float] = field(default_factory=dict)
    artifact: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    expected: str | None = None
    power: Power | None = None
    prechecks: tuple[Rung, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return the result as report.json holds it; non-finite numbers are strings."""
        made: dict[str, Any] = {
            "case": self.case,
            "runtime": self.runtime,
            "reference": self.reference,
            "precision": self.precision,
            "simulated": self.simulated,
            "status": self.status,
            "reason": self.reason,
            "stage": self.stage,
            "metrics": [_metric(item) for item in self.metrics],
            "coverage": {"planned": self.planned, "compared": self.compared},
            "timings_s": dict(self.timings_s),
            "artifact": dict(self.artifact) if self.artifact is not None else None,
            "notes": list(self.notes),
            "findings": list(self.findings),
            "expected": self.expected,
            "power": None if self.power is None else _power(self.power),
            "prechecks": [{"name": rung.name, "state": rung.state, "detail": rung.detail} for rung in self.prechecks],
        }
        return {key: finite(value) for key, value in made.items()}


def _power(power: Power) -> dict[str, Any]:
    caught = power.tried - len(power.missed)
    share = caught / power.tried if power.tried else None
    return {"tried": power.tried, "caught": caught, "share": share, "missed": list(power.missed)}


def _metric(item: Judged) -> dict[str, Any]:
    bound = item.bound
    return {
        "name": item.metric.name,
        "value": item.metric.value,
        "bound": bound.value if bound else None,
        "source": bound.source if bound else None,
        "why": bound.why if bound else None,
        "floor": bound.floor if bound else None,
        "over_bound": item.metric.value / bound.value if bound and bound.value else None,
        "over_floor": item.metric.value / bound.floor if bound and bound.floor else None,
        "worst": dict(item.metric.worst),
        "passed": item.passed,
    }


@dataclass(frozen=True, slots=True)
class Report:
    """Results and the environment they were made in."""

    results: tuple[Result, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    unwritten: tuple[str, ...] = ()
    """Why recordings could not be written; no verdict depends on them."""

    @property
    def passed(self) -> bool:
        """True if something was compared and nothing failed."""
        return self.exit_code() == 0

    def exit_code(self, *, require: Iterable[str] = (), allow_inconclusive: bool = False) -> int:
        """Return 2 for a wrong config, 1 for a mismatch or inconclusive, 3 for an error or nothing compared, else 0.

        A recording that could not be written counts as an error.

        Args:
            require: runtimes whose ``not_run`` counts as an error.
            allow_inconclusive: do not count inconclusive results as failures.
        """
        counted = [result for result in self.results if result.expected is None]
        statuses = Counter(result.status for result in counted)
        required = set(require)
        unmet = required - {result.runtime for result in self.results}
        unmet |= {result.runtime for result in self.results if result.status == "not_run"} & required
        if any(result.status == "error" and result.stage == "config" for result in counted):
            return 2
        if statuses["fail"] or (statuses["inconclusive"] and not allow_inconclusive):
            return 1
        compared = any(result.compared for result in self.results)
        return 3 if statuses["error"] or unmet or not compared or self.unwritten else 0

    def plain(self) -> dict[str, Any]:
        """Return the report as report.json holds it; non-finite numbers are strings."""
        return merged([result.plain() for result in self.results], self.environment, unwritten=self.unwritten)

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md`` into a folder, each by one rename.

        Raises:
            ValidateError: they cannot be written.
        """
        write_reports(self.plain(), folder)

    def table(self) -> Table:
        """Return a table for a terminal or a notebook."""
        return table(self.plain())

    def closing(self) -> list[str]:
        """Return sentences that say what was proved and what was not."""
        return closing(self.plain())

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return "\n".join("  ".join(_row(result)) for result in self.plain()["results"])

    def _repr_html_(self) -> str:
        import io

        from rich.console import Console

        console = Console(record=True, file=io.StringIO(), width=140)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def write_reports(plain: Mapping[str, Any], folder: Path) -> None:
    """Write the files of a report from its plain form.

    Raises:
        ValidateError: they cannot be written.
    """
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_texts(folder, {"report.json": text, "report.md": markdown(plain)})


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by their names into a folder, each by one rename.

    Raises:
        ValidateError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _replace(folder / name, text)
    except OSError as exc:
        raise ValidateError(f"cannot write the report to {folder}: {exc.strerror}; choose another directory") from exc


def remove_reports(folder: Path) -> None:
    """Remove the report of an earlier run, so that nobody takes it for that of a run that ends without one."""
    for name in ("report.json", "report.md"):
        with suppress(OSError):
            (folder / name).unlink()


def merged(
    plains: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], *, unwritten: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the plain form of a report from the plain results of several processes."""
    counts = Counter(result["status"] for result in plains)
    rows = sum(result["coverage"]["compared"] for result in plains)
    summary = {**{status: counts[status] for status in MARKS}, "results": len(plains), "rows_compared": rows}
    beside = {"unwritten": list(unwritten), "summary": summary}
    return {"schema": SCHEMA, "environment": dict(environment), "results": list(plains), **beside}


def _replace(path: Path, text: str) -> None:
    temporary = temporary_beside(path)
    try:
        # a lone surrogate, which UTF-8 does not have, becomes its JSON escape
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Return plain data with non-finite numbers as the strings nan, inf and -inf, which JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"


HEAD = ("case", "runtime", "precision", "status", "nearest bound", "worst row", "rows", "faults", "ms/run", "rows/s")


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
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
        f"{coverage['compared']}/{coverage['planned']}" if coverage["planned"] else "",
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
        cells = [escape(cell) for cell in _row(result)]
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
    results = plain["results"]
    unsettled = {(result["case"], result["runtime"]) for result in results if result["status"] == "error"}
    lines = []
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


def markdown(plain: Mapping[str, Any]) -> str:
    """Return the report for a GitHub step summary."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [line(_row(result)) for result in plain["results"]]
    parts = ["# qeff_validate", "", line(HEAD), line("---" for _ in HEAD), *rows, ""]
    found = problems(plain)
    if found:
        parts += ["## What did not pass, findings and notes", ""]
        parts += [f"- {text.splitlines()[0]}" + "".join(f"\n  {x}" for x in text.splitlines()[1:]) for text in found]
        parts.append("")
    parts += [*(f"{text}\n" for text in closing(plain))]
    return "\n".join(parts)
