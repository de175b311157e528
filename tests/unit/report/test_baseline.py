# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.vector_metrics import Metric
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.errors import ConfigError
from qeff_validate.report.baseline import baseline_files, parse_baseline, read_baseline, save_baseline, with_drift
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result


def report(value: float = 1e-6, status: Any = "pass", **changes: Any) -> Report:
    gate = GateResult(Metric("output.rel_l2", value), Bound(5e-5, "fallback", "table"))
    plain = {"case": "a", "runtime": "ort", "precision": "fp32", "metrics": (gate,), "planned": 3, "compared": 3}
    return Report((Result(**{**plain, "status": status, **changes}),), {"host": "here"})


def findings(before: Report, now: Report, folder: Path) -> tuple[str, ...]:
    save_baseline(folder, "v1", [before])
    made = with_drift(now, read_baseline(folder, "v1"))
    assert [result.status for result in made.results] == [result.status for result in now.results]
    return made.results[0].findings


def test_tenfold_value_within_its_bound_is_told_and_decides_nothing(tmp_path: Path) -> None:
    told = findings(report(1e-6), report(1e-5), tmp_path)
    assert told == ("baseline v1: output.rel_l2 grew 10 times, from 1e-06 to 1e-05, within its bound 5e-05",)


@pytest.mark.parametrize("value", [1e-6, 2.9e-6, 1e-9])
def test_value_near_the_old_one_or_below_it_is_not_told(tmp_path: Path, value: float) -> None:
    assert findings(report(1e-6), report(value), tmp_path) == ()


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (report(0.0), report(1e-5), "was 0, and is 1e-05 now"),
        (report(), report(float("nan")), "is nan now"),
        (report(status="inconclusive"), report(), "it was inconclusive then"),
        (report(), report(metrics=()), "was measured then, and is not now"),
        (report(), report(precision="fp16", value=1.0), "values are not compared"),
        (report(case="b"), report(), "has no a-ort"),
    ],
)
def test_other_differences_are_told(tmp_path: Path, before: Report, now: Report, words: str) -> None:
    told = findings(before, now, tmp_path)
    assert len(told) == 1
    assert words in told[0]


def test_what_did_not_run_is_left_alone(tmp_path: Path) -> None:
    assert findings(report(), report(status="not_run", metrics=()), tmp_path) == ()


def test_accuracy_and_timings_of_two_reports_are_put_together(tmp_path: Path) -> None:
    timing = {"workloads": [], "costs": {}, "machine": [], "fingerprint": {}}
    timed = Report((Result("a", "ort", "pass", reference="timing", performance=timing),), {})
    path = save_baseline(tmp_path / "baselines", "v1", [report(), timed])
    (entry,) = parse_baseline(path).results
    assert (entry.metrics, entry.performance, entry.precision) == ({"output.rel_l2": 1e-6}, timing, "fp32")
    assert json.loads(path.read_text())["schema"] == 1
    assert [file.stem for file in baseline_files(path.parent)] == ["v1"]


def test_baselines_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither metrics nor timings"):
        save_baseline(tmp_path, "v1", [Report(())])
    with pytest.raises(ConfigError, match="is no name"):
        save_baseline(tmp_path, "../v1", [report()])
    save_baseline(tmp_path, "v1", [report()])
    with pytest.raises(ConfigError, match=r"no baseline is called 'v2' in .* Known: v1\."):
        read_baseline(tmp_path, "v2")
    (tmp_path / "v3.json").write_text('{"schema": 9}')
    with pytest.raises(ConfigError, match="no baseline of schema 1"):
        read_baseline(tmp_path, "v3")
    (tmp_path / "v4.json").write_text('{"schema": 1, "name": "v4", "environment": {}, "results": [{"case": "a"}]}')
    with pytest.raises(ConfigError, match=r"results.0.runtime: Field required"):
        read_baseline(tmp_path, "v4")
