# SPDX-License-Identifier: Apache-2.0
"""Results of cases on runtimes, and the report that holds them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qeff_validate.comparison.verdict import GateResult, Power, Status

if TYPE_CHECKING:
    from rich.table import Table
from qeff_validate.report.text import closing, row_cells, table
from qeff_validate.report.timings import is_timing
from qeff_validate.report.writers import write_reports

SCHEMA = 1


DEFAULT_DIR = "qv-report"


@dataclass(frozen=True, slots=True)
class Precheck:
    """One precheck: whether both sides of a comparison were made from the same thing.

    Attributes:
        name: one of `prechecks.checks.PRECHECKS`.
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
    """What came out for one case on one runtime.

    Examples:
        >>> result = Result("small", "ai100", "not_run", reason="no AI 100 SDK")
        >>> result.plain()["coverage"]
        {'planned': 0, 'compared': 0}
    """

    case: str
    runtime: str
    status: Status
    reason: str = ""
    stage: str | None = None
    reference: str = "hf"
    precision: str | None = None
    simulated: bool = False
    metrics: tuple[GateResult, ...] = ()
    planned: int = 0
    compared: int = 0
    timings_s: Mapping[str, float] = field(default_factory=dict)
    artifact: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    expected: str | None = None
    power: Power | None = None
    prechecks: tuple[Precheck, ...] = ()
    performance: Mapping[str, Any] | None = None
    """Timings as distributions, costs, machine and judgements, of `pipeline.performance`; None of other results."""

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
            "prechecks": [
                {"name": precheck.name, "state": precheck.state, "detail": precheck.detail}
                for precheck in self.prechecks
            ],
        }
        if self.performance is not None:
            made["performance"] = dict(self.performance)
        return {key: finite(value) for key, value in made.items()}


def _power(power: Power) -> dict[str, Any]:
    caught = power.tried - len(power.missed)
    share = caught / power.tried if power.tried else None
    return {"tried": power.tried, "caught": caught, "share": share, "missed": list(power.missed)}


def _metric(item: GateResult) -> dict[str, Any]:
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
    """Results and the environment they were made in.

    Examples:
        >>> Report((Result("small", "ort", "pass", planned=3, compared=3),)).exit_code()
        0
        >>> Report(()).exit_code()  # nothing was compared
        3
    """

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
        return "\n".join("  ".join(row_cells(result)) for result in self.plain()["results"])

    def _repr_html_(self) -> str:
        import io

        from rich.console import Console

        console = Console(record=True, file=io.StringIO(), width=140)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def merged(
    plains: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], *, unwritten: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the plain form of a report from the plain results of several processes."""
    counts = Counter(result["status"] for result in plains)
    rows = sum(result["coverage"]["compared"] for result in plains if not is_timing(result))
    summary = {**{status: counts[status] for status in get_args(Status)}, "results": len(plains), "rows_compared": rows}
    beside = {"unwritten": list(unwritten), "summary": summary}
    return {"schema": SCHEMA, "environment": dict(environment), "results": list(plains), **beside}


def finite(value: Any) -> Any:
    """Return plain data with non-finite numbers as the strings nan, inf and -inf, which JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
