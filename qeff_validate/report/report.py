# SPDX-License-Identifier: Apache-2.0
"""The report: results and the environment that they were made in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qeff_validate.comparison.verdict import Status
from qeff_validate.errors import ConfigError, IncomparableError
from qeff_validate.files import read_json
from qeff_validate.registry import registered
from qeff_validate.report.markdown import markdown_lines
from qeff_validate.report.notebook import notebook_table
from qeff_validate.report.result import Result
from qeff_validate.report.text import closing, problems, row_cells, table
from qeff_validate.report.timings import is_timing
from qeff_validate.report.writers import write_reports

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1

DEFAULT_DIR = "qv-report"

MOST_IN_NOTEBOOK = 30
"""A notebook shows the charts of at most so many results, which take some 20 KB each."""

MOST_BYTES = 256 << 20
"""A greater report is not read."""


@dataclass(frozen=True, slots=True)
class Report:
    """Results and the environment they were made in.

    Examples:
        >>> Report((Result("small", "ort", "pass", planned=3, compared=3),)).exit_code()
        0
        >>> Report(()).exit_code()  # nothing was compared
        3
    """

    results: Sequence[Result]
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
        statuses, runtimes, not_run = set[str](), set[str](), set[str]()
        wrong_config, compared = False, False
        for result in self.results:
            runtimes.add(result.runtime)
            compared |= result.compared > 0
            if result.status == "not_run":
                not_run.add(result.runtime)
            if result.expected is None:
                statuses.add(result.status)
                wrong_config |= result.status == "error" and result.stage == "config"
        required = set(require)
        if wrong_config:
            return 2
        if "fail" in statuses or ("inconclusive" in statuses and not allow_inconclusive):
            return 1
        unmet = (required - runtimes) | (required & not_run)
        return 3 if "error" in statuses or unmet or not compared or self.unwritten else 0

    def plain(self) -> dict[str, Any]:
        """Return the report as report.json holds it; non-finite numbers are strings."""
        return self._plain_with([result.plain() for result in self.results])

    def _plain_with(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        counts = Counter(result.status for result in self.results)
        return {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "results": results,
            "unwritten": list(self.unwritten),
            "summary": {
                **{status: counts[status] for status in get_args(Status)},
                "results": len(self.results),
                "rows_compared": self.rows_compared,
            },
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Report:
        """Return the report that `plain` describes.

        Raises:
            IncomparableError: it is of another schema, or a value is missing or of another type.
        """
        if plain.get("schema") != SCHEMA:
            raise IncomparableError(f"a report has schema {SCHEMA}, this has {plain.get('schema')!r}: make it anew")
        results, environment, unwritten = (plain.get(name) for name in ("results", "environment", "unwritten"))
        environment = {} if environment is None else environment
        if not (isinstance(results, list) and isinstance(environment, Mapping)):
            raise IncomparableError("it is no report: it has no list of results, or its environment is no mapping")
        if not all(isinstance(text, str) for text in unwritten or ()):
            raise IncomparableError("it is no report: what could not be written is no list of texts")
        return cls(tuple(map(Result.from_plain, results)), environment, tuple(unwritten or ()))

    @property
    def rows_compared(self) -> int:
        """The number of rows that were compared, over all results."""
        return sum(result.compared for result in self.results if not is_timing(result))

    def write(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and ``report.html`` into a folder, each by one rename.

        Raises:
            ValidateError: they cannot be written.
        """
        write_reports(self, folder)

    def table(self, *, width: int | None = None) -> Table:
        """Return a table for a terminal of a width in columns; None: all columns, as for a notebook."""
        return table(self.results, width=width)

    def closing(self) -> list[str]:
        """Return sentences that say what was proved and what was not."""
        return closing(self.results)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return "\n".join("  ".join(row_cells(result)) for result in self.results)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002
        printer.text(str(self))  # what IPython prints where it cannot show HTML

    def _repr_html_(self) -> str:
        few = len(self.results) <= MOST_IN_NOTEBOOK
        page = "".join(registered("writers")["html"].load()(self)) if few else ""  # it imports this module
        return notebook_table(self.results, self.closing(), page)

    def problems(self) -> list[str]:
        """Return a line for every result that did not pass, every finding, note and recording that was not written."""
        return [*problems(self.results), *self.unwritten]


def report_file(path: Path) -> Path:
    """Return the file of a report: the path itself, or ``report.json`` in it if it is a folder."""
    return path / "report.json" if path.is_dir() else path


def read_report(path: Path) -> Report:
    """Read ``report.json``, or the one in a folder.

    Raises:
        ConfigError: it cannot be read, or is no report of this schema.
    """
    file = report_file(path)
    return report_of(read_json(file, most_bytes=MOST_BYTES), str(file))


def report_of(data: Any, where: str) -> Report:
    """Return the report in the data of a JSON file, whose name messages begin with.

    Raises:
        ConfigError: it is no report of this schema.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is no report: it is no JSON object")
    try:
        return Report.from_plain(data)
    except IncomparableError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def json_report(report: Report) -> Iterator[str]:
    """Yield the content of report.json in pieces: the plain form of one result at a time is in memory."""
    for number, (name, value) in enumerate(report._plain_with([]).items()):
        yield f"{',' if number else '{'}\n {json.dumps(name)}: "
        if name != "results" or not report.results:
            yield _json(value, depth=1)
            continue
        for place, result in enumerate(report.results):
            yield f"{',' if place else '['}\n  {_json(result.plain(), depth=2)}"
        yield "\n ]"
    yield "\n}\n"


def _json(value: Any, depth: int) -> str:
    """Return a value as it stands in a JSON file at a depth: each depth is a space at the begin of its lines."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).replace("\n", "\n" + " " * depth)


def markdown_report(report: Report) -> Iterator[str]:
    """Yield the content of report.md in pieces."""
    for number, line in enumerate(markdown_lines(report.results, report.unwritten, report.environment)):
        yield f"\n{line}" if number else line
