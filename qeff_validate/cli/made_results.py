# SPDX-License-Identifier: Apache-2.0
"""The results of the command ``run`` as they are made, on the disk before the run has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_validate.cli.progress import print_text
from qeff_validate.errors import ValidateError
from qeff_validate.report.lazy_results import planned_results
from qeff_validate.report.result import Result
from qeff_validate.report.results_file import Line, ResultsFile
from qeff_validate.report.writers import write_texts

if TYPE_CHECKING:
    from qeff_validate.config.case import Case
    from qeff_validate.protocols import Settings
    from qeff_validate.report.report import Report

REPORT_EVERY_S = 10
"""How often ``report.json`` is written while a run goes on, at most."""

REPORT_SHARE = 0.05
"""Share of the time that writing it may take."""


class MadeResults(MutableMapping[tuple[str, str], Result]):
    """The results of a run by case and runtime, as they are made: in `results_file.ResultsFile`, not in memory.

    ``report.json`` beside it is written now and then while the run goes on.

    Args:
        folder: of the report.
        planned: cases and names of runtimes, in the order of the report.
        settings: of the runtimes.
        resumed: folder of the report of the run that is resumed; None: there is none.

    Raises:
        ConfigError: the folder that is to be resumed has no results, or others.
    """

    def __init__(
        self, folder: Path, planned: Sequence[tuple[Case, str]], settings: Settings, resumed: Path | None
    ) -> None:
        from qeff_validate.engine import result_key

        self._folder, self._file, self._settings = folder, ResultsFile(folder), settings
        self._keys = {(case.name, name): result_key(case, name, settings) for case, name in planned}
        self._earlier = None if resumed is None else ResultsFile(resumed)
        self._known = {
            place: line
            for place, line in ({} if self._earlier is None else self._earlier.read()).items()
            if self._keys.get(place) == line.key and line.status in ("pass", "fail", "inconclusive")
        }
        self._made: dict[tuple[str, str], Line | Result] = {}
        self._next_report = -math.inf

    def __getitem__(self, place: tuple[str, str]) -> Result:
        found = self._made[place]
        return self._file.at(found) if isinstance(found, Line) else found

    def __setitem__(self, place: tuple[str, str], result: Result) -> None:
        try:
            self._made[place] = self._file.add(self._keys[place], result)
            self._write_unfinished()
        except ValidateError:  # the report tells that the folder cannot be written
            self._made.setdefault(place, result)

    def __delitem__(self, place: tuple[str, str]) -> None:
        del self._made[place]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def _write_unfinished(self) -> None:
        from qeff_validate.report.report import json_report

        start = time.monotonic()
        if len(self._made) < len(self._keys) and start > self._next_report:
            write_texts(self._folder, {"report.json": json_report(self._report("the run has not ended"))})
            spent = time.monotonic() - start
            self._next_report = start + max(REPORT_EVERY_S, spent / REPORT_SHARE)

    def _report(self, why_missing: str) -> Report:
        """Return the report of what is done; what is not has not run, for a reason."""
        from qeff_validate.report.report import Report

        return Report(planned_results([*self._keys], self, why_missing), self._environment)

    @cached_property
    def _environment(self) -> dict[str, Any]:
        from qeff_validate.engine import environment

        return environment(self._settings)

    @contextmanager
    def reported_if_interrupted(self) -> Iterator[None]:
        """Begin the file with what is known; if Ctrl-C or SIGTERM ends the run, write the report of what is done."""
        earlier = self._earlier
        if earlier is None or not self._known:
            self._file.clear()
        else:
            lines = self._file.begin((line.key, earlier.at(line)) for line in self._known.values())
            self._made = dict(zip(self._known, lines, strict=True))
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if self._made:
                write_report(self._report("the run was interrupted"), self._folder)
                count = f"{len(self._made)} of {len(self._keys)}"
                print_text(f"{count} results are in {self._folder}; --resume makes the others")
            raise


def write_report(results: Report, folder: Path) -> ValidateError | None:
    """Write the report. An error is returned, not raised, so that the results are printed first."""
    try:
        results.write(folder)
    except ValidateError as exc:
        return exc
    return None
