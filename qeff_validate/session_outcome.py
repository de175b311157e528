# SPDX-License-Identifier: Apache-2.0
"""What the suites of a pytest session planned and reported, and the exit status that follows.

Under pytest-xdist the controller's outcome counts. Workers send it the ids of their tests, in which case and runtime
are found again, and their reports. Loads no framework; the engine is imported when there is something to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_validate.report.kept_results import KeptResults
    from qeff_validate.report.result import Result

Target = tuple[str, str]
"""The names of a case and a runtime."""

NO_TARGET: Target = ("", "")
"""Stands for a test of a suite that no case of the config belongs to; pytest skips it."""

NOTHING_COMPARED = 3
"""The exit status of a session that would be green otherwise; the command line has the same."""


@dataclass(frozen=True, slots=True)
class ReportedResult:
    """A result that a test has reported.

    Attributes:
        case: its name.
        runtime: its name.
        status: of the result.
        compared: rows that were compared.
        read: returns the result.
    """

    case: str
    runtime: str
    status: str
    compared: int
    read: Callable[[], Result]


@dataclass(eq=False)
class SessionOutcome:
    """Tests of the suites and their reports.

    Attributes:
        worker: True on a worker of pytest-xdist, which hands its results to the controller.
        planned: case and runtime of each selected test that uses ``qv_target``, by its id.
        results: what each test has reported, by test id.
        ended: ids of tests that were run to their end, or skipped.
        passed: ids of tests that passed.
        failures: why a test failed, by its id; the first reason counts.
        running: whether tests were run at all, or only collected.
        stopped: why the session ended early, if something said so.
    """

    worker: bool = False
    planned: dict[str, Target] = field(default_factory=dict)
    results: dict[str, list[ReportedResult]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    running: bool = False
    stopped: str = ""
    _kept: KeptResults | None = None

    def add_ids(self, ids: Iterable[str], targets: Mapping[str, Target]) -> None:
        """Add tests that are known by their ids alone, as those of workers are.

        Args:
            ids: of pytest, such as ``test_embedding.py::test_one[case-ort]``.
            targets: case and runtime by ``CASE-RUNTIME``.
        """
        for test in ids:
            parameters = test.partition("[")[2].removesuffix("]")
            fitting = [name for name in targets if f"-{name}-" in f"-{parameters}-"]
            if fitting:
                self.planned[test] = targets[max(fitting, key=len)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add a test report of one phase; ``qv_result`` and ``qv_target`` are attached to those of the suites."""
        test = report.nodeid
        if hasattr(report, "qv_target"):
            self.planned[test] = tuple(report.qv_target)
        elif report.when in ("setup", "call", "teardown"):
            self.planned.pop(test, None)  # a test of somebody else's with an id like ours
            return
        if hasattr(report, "qv_result") and not self.worker:
            self.results.setdefault(test, []).append(self._reported(report.qv_result))
            del report.qv_result  # pytest keeps its reports to the end
        if report.when != "setup" or report.outcome != "passed":
            self.ended.add(test)
        if report.when == "call" and report.outcome == "passed":
            self.passed.add(test)
        if report.outcome == "failed" and test in self.planned:
            self.failures.setdefault(test, _reason(report))

    def _reported(self, plain: Mapping[str, Any]) -> ReportedResult:
        from qeff_validate.report.kept_results import KeptResults

        self._kept = self._kept or KeptResults()
        compared = plain["coverage"]["compared"]
        return ReportedResult(plain["case"], plain["runtime"], plain["status"], compared, self._kept.keep(plain))

    def all_results(self) -> Sequence[Result]:
        """Return the results of all tests, an error for each one that failed without a result or never reported."""
        from qeff_validate.report.lazy_results import LazyResults

        reported = [(each.case, each.runtime, each.read) for of_test in self.results.values() for each in of_test]
        errors = [(error.case, error.runtime, lambda error=error: error) for error in self._errors()]
        ordered = sorted([*reported, *errors], key=lambda each: each[:2])
        return LazyResults(len(ordered), lambda place: ordered[place][2]())

    def _errors(self) -> Iterator[Result]:
        from qeff_validate.report.result import Result

        early = f" ({self.stopped})" if self.stopped else ""
        for test, (case, runtime) in self.planned.items():
            states = {each.status for each in self.results.get(test, [])}
            if (case, runtime) == NO_TARGET:
                continue
            if test not in self.ended:
                reason = f"{test} was planned and did not report: the session ended before{early}"
            elif test in self.failures and states <= {"pass"}:
                reason = f"{test} failed: {self.failures[test]}"
            else:
                continue
            yield Result(case, runtime, "error", reason, stage="pytest")

    def problems(self, required: Sequence[str], *, asked: bool) -> list[str]:
        """Return why the session must not end green.

        Args:
            required: runtimes that must run.
            asked: the suites were asked for, so that a session without a test of theirs is no success either.
        """
        if not self.planned and not asked:
            return []
        lost = [test for test in self.planned if test not in self.ended]
        problems = [f"{len(lost)} of {len(self.planned)} planned tests did not report, first {lost[0]}"] if lost else []
        results = [each for of_test in self.results.values() for each in of_test]
        if not any(each.compared for each in results) and not self.passed & self.planned.keys():
            why = "no test of the suites was selected"
            if self.planned:
                why = (
                    "no test of the suites got that far" if lost or self.failures else "all tests of them were skipped"
                )
            problems.append(f"nothing was compared by the suites: {why}")
        ran = {each.runtime for each in results if each.status != "not_run"}
        ran |= {self.planned[test][1] for test in self.passed & self.planned.keys()}
        selected = {runtime for _, runtime in self.planned.values()}
        for name in required:
            if name not in selected:
                problems.append(f"{name} is required, and no selected test has this runtime")
            elif name not in ran:
                problems.append(f"{name} is required and did not run")
        return problems


def _reason(report: Any) -> str:
    """Return the message of a failure in one line."""
    if isinstance(report.longrepr, str):
        return report.longrepr  # that of a worker that died
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(getattr(crash, "message", None) or getattr(report, "longreprtext", "") or "no reason was given")
    return next((line for line in text.splitlines() if line.strip()), text)
