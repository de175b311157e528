# SPDX-License-Identifier: Apache-2.0
"""A session from its beginning to its report: what is planned, what came of it, and whether that is a success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from qeff_validate.plugin.collection import cases_of, plugin_markers, runtimes_of
from qeff_validate.plugin.fixtures import target_of
from qeff_validate.plugin.options import (
    MARKERS,
    OPTIONS,
    check_jobs,
    check_reporters,
    configs,
    explain_mode,
    is_worker,
    listed,
    only_shown,
    option,
    place,
    run_timeout,
    suites_asked,
)
from qeff_validate.registry import registered
from qeff_validate.session_outcome import NOTHING_COMPARED, SessionOutcome

if TYPE_CHECKING:
    from qeff_validate.report.report import Report


_OUTCOME: pytest.StashKey[SessionOutcome] = pytest.StashKey()

_REPORT: pytest.StashKey[Report] = pytest.StashKey()

_PROBLEMS: pytest.StashKey[list[str]] = pytest.StashKey()

_REMOVED: pytest.StashKey[bool] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Register what collects the reports of the suites; and the markers, where suites or cases are used at all.

    Elsewhere ``slow``, ``torch`` and the like stay unknown, so that ``--strict-markers`` finds a misspelt marker.
    """
    config.stash[_OUTCOME] = SessionOutcome(worker=is_worker(config))
    config.pluginmanager.register(config.stash[_OUTCOME], "qeff_validate-outcome")
    used = suites_asked(config) or any(option(config, name) for name in OPTIONS)
    for name, text in {**plugin_markers(), **MARKERS}.items() if used else ():
        config.addinivalue_line("markers", f"{name}: {text}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Check what was asked for before anything is collected: a usage error must not look like a broken test file."""
    config = session.config
    if option(config, "run-timeout"):
        run_timeout(config)
    if option(config, "explain"):
        explain_mode(config)
    check_jobs(config)
    check_reporters(config)
    if any(option(config, name) for name in ("config", "model", "runtimes", "require")):
        cases_of(config)
    path = place(config, "report")
    if path is not None and report_wanted(config) and not (only_shown(config) or is_worker(config)):
        from qeff_validate.errors import ConfigError
        from qeff_validate.folders import check_writable

        try:
            check_writable(path, "--qv-report")
        except ConfigError as exc:
            raise pytest.UsageError(str(exc)) from exc
        remove_old_report(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what the suites are set up with, if anything was set."""
    values = {name: option(config, name) for name in OPTIONS}
    chosen = ", ".join(f"{name}={value}" for name, value in values.items() if value)
    return [f"qeff_validate: {chosen}"] if chosen else []


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Note which tests are about to run; the report of an earlier run goes before the first of them."""
    config = session.config
    if only_shown(config):
        return
    config.stash[_OUTCOME].running = True
    config.stash[_OUTCOME].planned |= {
        item.nodeid: target for item in getattr(session, "items", []) if (target := target_of(item))
    }
    remove_old_report(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Note what a worker is about to run."""
    outcome = node.config.stash[_OUTCOME]
    runtimes = [*registered("runtimes")]
    if any(f"-{name}" in test for test in ids for name in runtimes):  # else leave the engine alone
        targets = {
            f"{case.name}-{name}": (case.name, name)
            for case in cases_of(node.config)
            for name in runtimes_of(node.config, case)
        }
        outcome.add_ids(ids, targets)
    remove_old_report(node.config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the report; nothing compared, a required runtime that did not run, or a lost test is no success."""
    config = session.config
    outcome = config.stash[_OUTCOME]
    if is_worker(config) or not outcome.running:
        return
    outcome.stopped = str(session.shouldfail or session.shouldstop or ("interrupted" if exitstatus == 2 else ""))
    asked = suites_asked(config) or bool(config.getoption("--qv-require"))
    problems = outcome.problems(listed(config, "require"), asked=asked)
    if report_wanted(config):
        problems += _concluded(config, outcome)
    config.stash[_PROBLEMS] = problems
    if problems and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = NOTHING_COMPARED


def _concluded(config: pytest.Config, outcome: SessionOutcome) -> list[str]:
    """Make the report of a session and write it; return why it could not be written."""
    from qeff_validate.engine import environment
    from qeff_validate.errors import ValidateError
    from qeff_validate.protocols import Settings
    from qeff_validate.report.report import Report
    from qeff_validate.report.reporters import load_reporters, send_report

    config.stash[_REPORT] = Report(outcome.all_results(), environment(Settings(sdk=option(config, "sdk"))))
    path = place(config, "report")
    try:
        if path is not None:
            config.stash[_REPORT].write(path)
        send_report(config.stash[_REPORT], load_reporters(listed(config, "reporters")))
    except ValidateError as exc:
        return [str(exc)]
    return []


def _annotations(config: pytest.Config, report: Report) -> list[str]:
    """Return annotations of the results that fail, in a job of GitHub Actions."""
    from qeff_validate.config.loader import case_places
    from qeff_validate.report.annotations import github_annotations, on_github

    if not on_github():
        return []
    places = {} if option(config, "model") else case_places(configs(config))
    allowed = bool(config.getoption("--qv-allow-inconclusive"))
    return list(
        github_annotations(report.results, places, require=listed(config, "require"), allow_inconclusive=allowed)
    )


def remove_old_report(config: pytest.Config) -> None:
    """Remove the report of an earlier run, if this one will write its own."""
    path = place(config, "report")
    if path is not None and report_wanted(config) and not is_worker(config) and not config.stash.get(_REMOVED, False):
        from qeff_validate.report.writers import remove_reports

        remove_reports(path)
        config.stash[_REMOVED] = True


def report_wanted(config: pytest.Config) -> bool:
    """Say whether this session writes a report; a directory in the ini file is for sessions with the suites alone."""
    return bool(config.stash[_OUTCOME].planned or suites_asked(config) or config.getoption("--qv-report"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was compared and proved, and why the session is no success."""
    report, problems = config.stash.get(_REPORT, None), config.stash.get(_PROBLEMS, [])
    if report is None and not problems:
        return
    terminalreporter.section("qeff_validate")
    if report is not None:
        from qeff_validate.report.text import MARKS

        statuses = Counter(str(result.status) for result in report.results)
        counts = ", ".join(f"{statuses[name]} {name}" for name in MARKS)
        terminalreporter.write_line(f"{report.rows_compared} rows compared: {counts}")
        for line in report.closing():
            terminalreporter.write_line(line)
        path = place(config, "report")
        if path is not None:
            terminalreporter.write_line(f"report: {path / 'report.html'}, {path / 'report.json'}")
        for line in _annotations(config, report):
            terminalreporter.write_line(line)
    for problem in problems:
        terminalreporter.write_line(f"ERROR: {problem}", red=True)
