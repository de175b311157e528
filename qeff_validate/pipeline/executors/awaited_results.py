# SPDX-License-Identifier: Apache-2.0
"""Results of an executor by case and runtime, for who asks for one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qeff_validate.config.case import Case
from qeff_validate.errors import RunError
from qeff_validate.pipeline.executors.in_process import Executor
from qeff_validate.report.kept_results import KeptResults
from qeff_validate.report.result import Result


class AwaitedResults:
    """What an executor makes in its own order, handed out in another one.

    Args:
        executor: makes the results; nothing begins before the first is asked for.
        planned: cases, and names of runtimes.
    """

    def __init__(self, executor: Executor, planned: Sequence[tuple[Case, str]]) -> None:
        self._results = executor.results(planned)
        self._kept = KeptResults()
        self._made: dict[tuple[str, str], Callable[[], Result]] = {}
        self._wanted = {(case.name, name) for case, name in planned}

    def __contains__(self, target: tuple[str, str]) -> bool:
        """Say whether a case, by its name, is planned on a runtime."""
        return target in self._wanted

    def get(self, case: str, runtime: str) -> Result:
        """Wait for a result that is planned; others that are made meanwhile are kept.

        Raises:
            RunError: the executor has ended without it, after an error that was raised before.
        """
        while (case, runtime) not in self._made:
            made = next(self._results, None)
            if made is None:
                raise RunError(f"{case} on {runtime}: the processes have ended before, with an error told elsewhere")
            other, name, result = made
            self._made[other.name, name] = self._kept.keep(result.plain())
        return self._made[case, runtime]()

    def close(self) -> None:
        """End all workers of the executor."""
        self._results.close()
