# SPDX-License-Identifier: Apache-2.0
"""Timings from outside: `perf`, `baseline`, `run --baseline` and the suite, with budgets that no load breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import case, cli, config, first_run, forked_pytest, report_in

import qeff_validate.engine  # noqa: F401 (pytester would unload it after each run in this process, and numpy with it)

WIDE = "performance: {launches: 3, seconds: 0.05, p50_ms: 60000, p95_ms: 60000, load_s: 600, max_slowdown: 100 %}"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory):
    """The small case is in the store, so that nothing need be built."""
    return first_run(tmp_path_factory.getbasetemp() / "first-run")


def perf(folder: Path, extra: str = WIDE, *options: str | Path) -> tuple[int, str, dict[str, Any]]:
    path = config(folder, case(extra=extra))
    done = cli("perf", path, "--runtimes", "ort", "--report", folder / "report", *options, cwd=folder)
    plain = report_in(folder / "report") if (folder / "report" / "report.json").exists() else {}
    return done.returncode, done.stdout + done.stderr, plain


@pytest.mark.slow
def test_timings_are_measured_judged_saved_and_compared_with(first, tmp_path: Path) -> None:
    code, text, plain = perf(tmp_path)
    (result,) = plain["results"]
    assert (code, result["status"], result["coverage"]) == (0, "pass", {"planned": 3, "compared": 3}), text
    assert "In time: ort keeps 3 budgets and limits: tiny." in text
    assert "agrees with Hugging Face" not in text
    names = [item["name"] for item in result["performance"]["workloads"]]
    assert names == ["seq_len 16, batch 1", "seq_len 16, batch 2"]
    assert {"load_s", "host_mb", "export_s", "artifact_mb"} <= result["performance"]["costs"].keys()
    assert "## Timings" in (tmp_path / "report" / "report.md").read_text()

    saved = cli("baseline", "save", "v1", "--report", tmp_path / "report", cwd=tmp_path)
    assert (saved.returncode, (tmp_path / "baselines" / "v1.json").is_file()) == (0, True), saved.stderr
    assert "1 results, 1 with timings" in cli("baseline", "list", cwd=tmp_path).stdout
    assert "latency, seq_len 16, batch 2" in cli("baseline", "show", "v1", cwd=tmp_path).stdout

    for against in (tmp_path / "baselines" / "v1.json", tmp_path / "report", tmp_path / "cases.yaml"):
        code, text, plain = perf(tmp_path, WIDE, "--against", against, "--allow-inconclusive")
        judged = plain["results"][0]["performance"]["judgements"]
        slowdowns = [item for item in judged if item["name"].startswith("slowdown of ")]
        assert len(slowdowns) == 2
        # a program against itself: noise may hide the answer, and cannot double the time in all launches
        assert {item["status"] for item in slowdowns} <= {"pass", "inconclusive"}, text
        assert code == 0


@pytest.mark.slow
def test_budget_that_nothing_keeps_is_told_and_fails(first, tmp_path: Path) -> None:
    code, text, plain = perf(tmp_path, "performance: {launches: 3, seconds: 0.05, artifact_mb: 0.001}")
    assert (code, plain["results"][0]["status"]) == (1, "fail")
    assert "artifact_mb: fail: over budget" in text


@pytest.mark.slow
def test_budget_on_the_simulator_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = config(tmp_path, case(extra="performance: {p95_ms: 30}"))
    done = cli("perf", path, "--runtimes", "sim", "--report", tmp_path / "report", cwd=tmp_path)
    assert done.returncode == 2
    assert "say simulated: accept" in done.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_baseline_that_has_not_the_case_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"schema": 1, "results": []}))
    code, text, _ = perf(tmp_path, WIDE, "--against", tmp_path / "old.json")
    assert code == 2
    assert "has no timings of tiny-ort" in text


@pytest.mark.slow
def test_run_tells_what_drifted_since_a_baseline(first, tmp_path: Path) -> None:
    path = config(tmp_path)
    options = ("run", path, "--runtimes", "ort", "--report", tmp_path / "report")
    assert cli(*options, cwd=tmp_path).returncode == 0
    assert (
        cli("baseline", "save", "v1", "--report", tmp_path / "report", "--config", path, cwd=tmp_path).returncode == 0
    )
    file = tmp_path / "baselines" / "v1.json"
    plain = json.loads(file.read_text())
    (name,) = [name for name in plain["results"][0]["metrics"] if name.endswith("rel_l2")]
    plain["results"][0]["metrics"][name] /= 10
    file.write_text(json.dumps(plain))
    done = cli(*options, "--baseline", "v1", cwd=tmp_path)
    assert done.returncode == 0
    (finding,) = report_in(tmp_path / "report")["results"][0]["findings"]
    assert finding.startswith(f"baseline v1: {name} grew 10 times")
    assert finding in done.stdout
    missing = cli(*options, "--baseline", "v2", cwd=tmp_path)
    assert (missing.returncode, "no baseline is called 'v2'" in missing.stderr) == (2, True)


# --- the suite -------------------------------------------------------------------------------------


def suite(pytester: pytest.Pytester, extra: str, *options: str) -> pytest.RunResult:
    path = config(pytester.path, case(extra=extra))
    fixed = ("-p", "no:cacheprovider", "-rs", "--qv-config", str(path), "--qv-runtimes", "ort", "-m", "perf")
    return forked_pytest(pytester, *fixed, *options, "--pyargs", "qeff_validate.suites", timeout=240)


@pytest.mark.slow
def test_suite_judges_a_case_that_has_budgets(first, pytester: pytest.Pytester) -> None:
    result = suite(pytester, WIDE)
    assert result.parseoutcomes()["passed"] == 1
    assert "0 rows compared" in result.stdout.str(), "a timing compares no outputs"
    assert "In time: ort keeps 3 budgets and limits: tiny." in result.stdout.str()


@pytest.mark.slow
def test_suite_is_off_under_workers_and_says_so(first, pytester: pytest.Pytester) -> None:
    result = suite(pytester, WIDE, "-n", "1")
    result.assert_outcomes(skipped=1)
    assert "timings of ort are off under pytest-xdist" in result.stdout.str()


@pytest.mark.slow
def test_case_without_budgets_has_no_test_in_the_suite(pytester: pytest.Pytester) -> None:
    result = suite(pytester, "", "--collect-only", "-q")
    assert "test_performance" not in result.stdout.str()
