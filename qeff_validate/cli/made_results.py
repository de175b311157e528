# SPDX-License-Identifier: Apache-2.0
"""The results of the command ``run`` as they are made, on the disk before the run has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_validate.cli.progress import print_text
from qeff_validate.errors import ValidateError
from qeff_validate.report.results_file import ResultsFile
from qeff_validate.report.writers import write_texts

if TYPE_CHECKING:
    from qeff_validate.config.case import Case
    from qeff_validate.protocols import Settings
    from qeff_validate.report.report import Report
    from qeff_validate.report.result import Result

REPORT_EVERY_S = 10
"""How often ``report.json`` is written while a run goes on, at most."""


class MadeResults:
    """The results of a run as they are made: in `results_file.ResultsFile`, and in ``report.json`` beside it.

    Args:
        folder: of the report.
        planned: cases and names of runtimes, in the order of the report.
        settings: of the runtimes.
        kept: keys and results of the run that is resumed, by case and runtime.
    """

    def __init__(
        self,
        folder: Path,
        planned: Sequence[tuple[Case, str]],
        settings: Settings,
        kept: Mapping[tuple[str, str], tuple[str, Result]],
    ) -> None:
        from qeff_validate.engine import result_key

        self._folder, self._file, self._settings = folder, ResultsFile(folder), settings
        self._keys = {(case.name, name): result_key(case, name, settings) for case, name in planned}
        self.known = {
            place: result
            for place, (key, result) in kept.items()
            if self._keys.get(place) == key and result.status in ("pass", "fail", "inconclusive")
        }
        self._made = dict(self.known)
        self._written = -math.inf

    def add(self, _case: Case, result: Result) -> None:
        """Take a result of the run."""
        place = result.case, result.runtime
        self._made[place] = result
        with suppress(ValidateError):  # the report tells that the folder cannot be written
            self._file.add(self._keys[place], result)
            self._write_unfinished()

    def _write_unfinished(self) -> None:
        from qeff_validate.report.report import json_report

        if len(self._made) < len(self._keys) and time.monotonic() - self._written > REPORT_EVERY_S:
            write_texts(self._folder, {"report.json": json_report(self._report("the run has not ended"))})
            self._written = time.monotonic()

    def _report(self, why_missing: str) -> Report:
        """Return the report of what is done; what is not has not run, for a reason."""
        from qeff_validate.report.report import Report
        from qeff_validate.report.result import Result

        results = (self._made.get(place, Result(*place, "not_run", why_missing)) for place in self._keys)
        return Report(tuple(results), self._environment)

    @cached_property
    def _environment(self) -> dict[str, Any]:
        from qeff_validate.engine import environment

        return environment(self._settings)

    @contextmanager
    def reported_if_interrupted(self) -> Iterator[None]:
        """Begin the file with what is known; if Ctrl-C or SIGTERM ends the run, write the report of what is done."""
        self._file.clear()
        for result in self.known.values():
            self._file.add(self._keys[result.case, result.runtime], result)
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
