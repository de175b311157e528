# SPDX-License-Identifier: Apache-2.0
"""The default executor: one result after the other, in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from qeff_validate.config.case import Case
from qeff_validate.pipeline.explanation import ExplainMode
from qeff_validate.pipeline.runner import Runner
from qeff_validate.pipeline.stages import NumberedProgress
from qeff_validate.report.result import Result


class Executor(Protocol):
    """Makes the results of cases on runtimes, in any order."""

    def results(self, planned: Sequence[tuple[Case, str]]) -> Generator[tuple[Case, str, Result]]:
        """Yield each result as it is made; closing the iterator ends what still runs.

        Args:
            planned: cases, and names of runtimes.
        """


class InProcess:
    """Runs and judges each case on each runtime in this process, in order.

    Args:
        runner: does it.
        progress: of the runner; is told which result is being made.
        explain: whether results that fail get an explanation.
    """

    def __init__(self, runner: Runner, progress: NumberedProgress, explain: ExplainMode = "off") -> None:
        self._runner, self._progress, self._explain = runner, progress, explain

    def results(self, planned: Sequence[tuple[Case, str]]) -> Generator[tuple[Case, str, Result]]:
        """Yield each result as it is made."""
        for self._progress.number, (case, name) in enumerate(planned, start=1):
            yield case, name, self._runner.result(case, name, self._explain)
