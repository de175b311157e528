# SPDX-License-Identifier: Apache-2.0
"""Pytest sessions that must not end green, and reports that must not be greener than the session."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import qeff_validate.engine  # noqa: F401 (pytester would unload it after each run in this process, and numpy with it)

pytestmark = pytest.mark.integration

CONFTEST = """
import os, signal
import pytest
from qeff_validate.report.result import Result

class Runner:
    def result(self, case, name, explain):
        what = os.environ.get(f"QV_TEST_{case.name}_{name}".upper(), "not_run" if name == "ai100" else "pass")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "interrupted":
            raise KeyboardInterrupt
        if what == "raises":
            raise RuntimeError("the fixture broke")
        rows = 0 if what == "not_run" else 3
        return Result(case.name, name, what, "no card", precision="fp32", planned=rows, compared=rows)

@pytest.fixture(scope="session")
def qv_runner():
    return Runner()
"""
SUITE = "from qeff_validate.suites.test_embedding import test_embed_model_pytorch_vs_onnx_vs_ai100"
CASES = """
cases:
  - {name: a, source: 'random:bert', runtimes: [torch, ort]}
  - {name: b-a, source: 'random:bert', runtimes: [torch, ort]}
"""
TWO = ("-n", "2")


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with the embedding suite, over a runner that only says what the environment tells it to."""
    monkeypatch.setenv("QEFF_VALIDATE_SDK", str(pytester.path / "no-sdk"))
    monkeypatch.setenv("COLUMNS", "300")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_mine=SUITE, test_other="def test_other(): pass")
    (pytester.path / "c.yaml").write_text(CASES)


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest in this process, or in one of its own with workers."""
    fixed = ("-p", "no:cacheprovider", "--qv-config", "c.yaml")
    ends_it = {text for name, text in os.environ.items() if name.startswith("QV_TEST")} & {"killed", "interrupted"}
    if "-n" in arguments or ends_it:
        return pytester.runpytest_subprocess(*fixed, *arguments, timeout=120)
    return pytester.runpytest_inprocess(*fixed, *arguments)


def quick(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "--qv-config", "c.yaml", *arguments)


def report(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return plain


def told(result: pytest.RunResult) -> str:
    return result.stdout.str() + result.stderr.str()


# --- nothing compared -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "code", "text"),
    [
        (("test_mine.py",), 0, "12 rows compared"),
        (("test_mine.py", "-m", "ai100"), 3, "nothing was compared by the suites: all tests of them were skipped"),
        ((".", "-m", "ai100"), 3, "nothing was compared"),
        ((*TWO, ".", "-m", "ai100"), 3, "nothing was compared"),
        (("test_other.py",), 0, ""),
        ((*TWO, "test_other.py"), 0, ""),
        ((".", "-k", "test_other"), 0, ""),
        (("test_mine.py", "-k", "nothing_is_called_so"), 5, ""),
    ],
)
def test_a_session_whose_suites_compare_nothing_is_no_success(
    selection: tuple[str, ...], code: int, text: str, pytester: pytest.Pytester
) -> None:
    result = run(pytester, *selection)
    assert result.ret == code, told(result)
    assert text in told(result)
    assert ("ERROR: nothing was compared by the suites" in told(result)) == (code == 3)


@pytest.mark.parametrize("suite", ["test_peft", "test_peft -n 2", "test_embedding -k nothing_is_called_so"])
def test_suites_that_were_asked_for_and_compare_nothing_are_no_success(suite: str, pytester: pytest.Pytester) -> None:
    module, *selection = suite.split()
    result = run(pytester, *selection, "--pyargs", f"qeff_validate.suites.{module}")
    assert result.ret == 3, told(result)
    assert "ERROR: nothing was compared by the suites" in told(result)


@pytest.mark.parametrize("only", ["--collect-only", "--setup-plan", "--fixtures", "--markers"])
def test_a_session_that_runs_nothing_on_purpose_is_left_alone(only: str, pytester: pytest.Pytester) -> None:
    (pytester.mkdir("out") / "report.json").write_text("{}")
    assert quick(pytester, only, "--qv-report", "out", "test_mine.py").ret == 0
    assert (pytester.path / "out" / "report.json").read_text() == "{}"


def test_failures_of_pytest_keep_their_exit_status(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_other="def test_other(): assert False")
    assert quick(pytester, ".", "-m", "ai100 or not embedding").ret == pytest.ExitCode.TESTS_FAILED


# --- required runtimes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--qv-require", "sim"), "sim is required, and no selected test has this runtime"),
        (("--qv-require", "ort,ai100", "-m", "ort"), "ai100 is required, and no selected test has this runtime"),
        (("--qv-require", "ort", "-k", "a-torch"), "ort is required, and no selected test has this runtime"),
        (("--qv-require", "ort", "--deselect", "test_mine.py"), "ort is required, and no selected test"),
        (("--qv-require", "ort,ai100", "-m", "ort", *TWO), "ai100 is required, and no selected test has this runtime"),
        (("--qv-require", "ort"), None),
    ],
)
def test_a_required_runtime_that_no_selected_test_has_is_an_error(
    arguments: tuple[str, ...], reason: str | None, pytester: pytest.Pytester
) -> None:
    result = run(pytester, *arguments)
    assert result.ret == (3 if reason else 0), told(result)
    assert (reason or "rows compared") in told(result)


# --- tests that are lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["killed -n 2", "raises", "interrupted", "fail -x"])
def test_what_was_planned_and_did_not_report_is_an_error_of_the_report(
    cause: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, *options = cause.split()
    monkeypatch.setenv("QV_TEST_B-A_TORCH", status)
    result = run(pytester, *options, "--qv-report", "out", "test_mine.py")
    assert result.ret not in (0, 3), told(result)
    plain = report(pytester.path / "out")
    lost = {f"{each['case']}-{each['runtime']}": each for each in plain["results"] if each["status"] == "error"}
    if cause == "fail -x":
        assert "b-a-ort" in lost, "the test behind the failure never ran"
        assert plain["summary"]["fail"] == 1
    else:
        assert lost["b-a-torch"]["stage"] == "pytest"
        assert plain["summary"]["error"] >= 1
    proved = [line for line in told(result).splitlines() if line.startswith("Proved: torch")]
    assert [line for line in proved if "b-a" in line] == []
    planned = {f"{case}-{runtime}" for case in ("a", "b-a") for runtime in ("torch", "ort")}
    assert {f"{each['case']}-{each['runtime']}" for each in plain["results"]} == planned, "each planned test is told of"


def test_a_worker_that_is_not_replaced_loses_nothing_in_silence(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QV_TEST_A_TORCH", "killed")
    result = run(pytester, "-n", "1", "--max-worker-restart", "0", "--qv-report", "out", "test_mine.py")
    assert result.ret not in (0, 3), told(result)
    plain = report(pytester.path / "out")
    assert (plain["summary"]["error"], plain["summary"]["pass"]) == (4, 0)
    reasons = [each["reason"] for each in plain["results"]]
    assert sum("was planned and did not report" in reason for reason in reasons) == 3
    assert sum("crashed while running" in reason for reason in reasons) == 1


def test_an_assertion_of_ones_own_that_fails_is_in_the_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="import pytest\n@pytest.mark.embedding\ndef test_it(qv_result): assert qv_result.compared == 4"
    )
    result = quick(pytester, "-k", "a-ort and not b-a", "--qv-report", "out")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert report(pytester.path / "out")["summary"]["error"] == 1


# --- the report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [("-m", "ai100"), ("-k", "nothing_is_called_so"), ("-k", "test_other")])
def test_an_old_report_is_never_that_of_a_run_that_compared_nothing(
    selection: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    old = pytester.mkdir("out") / "report.json"
    old.write_text('{"summary": {"pass": 99}}')
    quick(pytester, *selection, "--qv-report", "out")
    assert report(old.parent)["summary"]["pass"] == 0


def test_an_old_report_is_gone_before_the_first_test_runs(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QV_TEST_A_TORCH", "killed")
    (pytester.mkdir("out") / "report.json").write_text("{}")
    run(pytester, "--qv-report", "out", "test_mine.py")
    assert list((pytester.path / "out").iterdir()) == []


def test_a_report_of_the_ini_file_is_left_alone_by_sessions_without_the_suites(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nqv_report = out\n")
    (pytester.mkdir("out") / "report.json").write_text("{}")
    assert quick(pytester, "test_other.py").ret == 0
    assert (pytester.path / "out" / "report.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["test_mine.py", "test_mine.py/below", "x" * 300])
def test_a_report_that_cannot_be_written_is_known_before_anything_runs(name: str, pytester: pytest.Pytester) -> None:
    result = quick(pytester, "--qv-report", name, "test_mine.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--qv-report: " in told(result)
    assert "passed" not in told(result)


def test_a_report_that_cannot_be_written_after_all_is_told_with_the_verdicts(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine=f"{SUITE}\nimport pathlib\ndef test_last(): pathlib.Path('out/report.json').mkdir(parents=True)"
    )
    result = quick(pytester, "--qv-report", "out", "test_mine.py")
    assert result.ret == 3
    assert "ERROR: cannot write the report to" in told(result)
    assert "Proved: torch agrees with Hugging Face" in told(result)


# --- marks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark", ["xfail", "skip", "skipif", "usefixtures", "parametrize", "flaky", "XFail", "", "_x", "a b"]
)
@pytest.mark.parametrize("place", ["case", "defaults"])
def test_marks_that_decide_whether_a_test_counts_are_refused(mark: str, place: str, pytester: pytest.Pytester) -> None:
    marks = f"marks: [slow, {mark!r}]"
    case = f"{{name: a, source: 'random:bert'{f', {marks}' if place == 'case' else ''}}}"
    defaults = f"defaults: {{{marks}}}\n" if place == "defaults" else ""
    (pytester.path / "c.yaml").write_text(f"{defaults}cases: [{case}]\n")
    result = quick(pytester, "--collect-only", "test_mine.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "marks" in told(result)
    assert "expect" in told(result) or "no name of a mark" in told(result)


@pytest.mark.parametrize(
    ("markers", "mark", "code", "text"),
    [
        ("nightly: runs at night", "nightly", 0, ""),
        ("rerun(times=1): runs again", "rerun", 4, "has a meaning of its own here"),
        ("", "nightly", 4, "'nightly' is not registered, and --strict-markers is on."),
        ("", "slwo", 4, "Did you mean 'slow'?"),
        ("", "ort", 4, "is the mark of the tests on that runtime"),
    ],
)
def test_marks_of_cases_only_select(markers: str, mark: str, code: int, text: str, pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\naddopts = --strict-markers\nmarkers =\n    {markers}\n")
    (pytester.path / "c.yaml").write_text(f"cases: [{{name: a, source: 'random:bert', marks: [{mark}]}}]\n")
    result = quick(pytester, "--collect-only", "test_mine.py")
    assert result.ret == code, told(result)
    assert text in told(result)
    assert "Traceback" not in told(result)


def test_an_unknown_mark_does_not_break_collection_where_markers_are_not_strict(pytester: pytest.Pytester) -> None:
    (pytester.path / "c.yaml").write_text("cases: [{name: a, source: 'random:bert', marks: [nightly]}]\n")
    assert quick(pytester, "-W", "default", "-m", "nightly and not ai100", "test_mine.py").ret == 0
    assert os.environ.get("QV_TEST_A_TORCH") is None
