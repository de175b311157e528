# SPDX-License-Identifier: Apache-2.0
"""The page of `make bench` says what was measured: missed goals, what was not measured, where time goes."""

from __future__ import annotations

import json
import time

import bench_figures
import bench_runs
import pytest
from bench_figures import Figure, Missing, Share


@pytest.mark.parametrize(
    ("value", "goal", "reached"),
    [
        (1.0, "<= 1", True),
        (1.1, "<= 1", False),
        (0.9, ">= 0.95", False),
        (2.0, "", None),
        (float("nan"), "<= 1", False),
    ],
)
def test_goal_is_reached_or_missed_and_nan_reaches_none(value: float, goal: str, reached: bool | None) -> None:
    assert Figure("a over b", value, goal).reached is reached


def test_page_has_every_figure_stage_and_omission() -> None:
    measured = [
        Figure("a over b", 1.234567, "<= 1", "3 / 2 s"),
        Share("the case", "export", 3.0, 4.0),
        Share("the case", "run on ort", 1.0, 4.0),
        Missing("large", "no room"),
    ]
    report = json.loads(json.dumps(bench_figures.plain(measured, {"processors": 2})))
    page = bench_figures.page(report)
    assert "| a over b | 1.23  | <= 1 | **no** | 3 / 2 s |" in page
    assert "| export | 3.0 | 75% |" in page
    assert "| run on ort | 1.0 | 25% |" in page
    assert "- large: no room" in page
    assert "| processors | 2 |" in page


def test_stage_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = bench_runs.Stopwatch()
    with watch.step("case: outer"), watch.step("case: inner"):
        pass
    assert watch.seconds == {"inner": 2.0, "outer": 5.0}
