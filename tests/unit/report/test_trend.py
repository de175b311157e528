# SPDX-License-Identifier: Apache-2.0
"""Values over several runs, in the order of the runs."""

from __future__ import annotations

import math
from pathlib import Path

from processes import cli, said

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.report.baseline import Entry, save_baseline
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result
from qeff_validate.report.trend import Trend, trends


def entry(case: str, **metrics: float) -> Entry:
    return Entry(case=case, runtime="ort", status="pass", metrics=metrics)


def test_each_quantity_has_a_value_a_run_and_none_where_it_was_not_measured() -> None:
    timed = {"workloads": [{"quantity": "latency", "name": "batch 2", "summary": {"p50_ms": 1.5, "shots": 9}}]}
    runs = [
        [entry("a", x=1.0)],
        [entry("a", x=3.0, y=0.0)],
        [entry("b", x=2.0).model_copy(update={"performance": timed})],
    ]
    assert {(item.case, item.quantity): item.values for item in trends(runs)} == {
        ("a", "x"): (1.0, 3.0, None),
        ("a", "y"): (None, 0.0, None),
        ("b", "x"): (None, None, 2.0),
        ("b", "latency, batch 2: p50_ms"): (None, None, 1.5),
    }


def test_growth_is_that_of_the_ends_and_bars_are_by_logarithms() -> None:
    grown = Trend("a", "ort", "x", (1e-7, 1e-6, None, 1e-5))
    assert (grown.growth, grown.bars()) == (1e-5 / 1e-7, "▁▅·█")
    assert Trend("a", "ort", "x", (2.0, 2.0)).bars() == "▁▁"
    broken = Trend("a", "ort", "x", (1.0, math.nan))
    assert (broken.growth, broken.bars()) == (None, "▁!")
    assert Trend("a", "ort", "x", (0.0, 3.0)).growth is None
    assert Trend("a", "ort", "x", (3.0,)).growth is None


def report(value: float) -> Report:
    metric = GateResult(Metric("output.rel_l2", value, {}), Bound(1e-5, "measured", "floor"))
    return Report((Result("tiny", "ort", "pass", metrics=(metric,), planned=3, compared=3),), {})


def test_command_takes_baselines_and_reports_in_the_given_order(tmp_path: Path) -> None:
    save_baseline(tmp_path / "baselines", "v1", [report(1e-7)])
    report(4e-7).write(tmp_path / "now")
    done = cli("baseline", "trend", "v1", "now", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert done.stdout.split("\n")[1].split() == [
        "tiny", "ort", "output.rel_l2", "1e-07", "4e-07", "×", "4", "▁█",
    ]  # fmt: skip
    assert "no baseline is called 'v2'" in said(cli("baseline", "trend", "v1", "v2", cwd=tmp_path))
    nothing = cli("baseline", "trend", "v1", "-k", "huge", cwd=tmp_path)
    assert (nothing.returncode, "-k 'huge' fits no case" in said(nothing)) == (2, True)
