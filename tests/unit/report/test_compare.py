# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_samples import HOSTILE, sample_report, sample_result

from qeff_validate.cli.app import run_command
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.errors import ConfigError
from qeff_validate.report.compare import Comparison, compare_reports, html_comparison
from qeff_validate.report.report import Report, read_report
from qeff_validate.report.result import Result


def with_value(value: float, **more: Any) -> Result:
    result = sample_result(**more)
    first = result.metrics[0]
    return replace(result, metrics=(GateResult(Metric(first.metric.name, value), first.bound),))


def compared(old: Result | None, new: Result | None) -> Comparison:
    reports = [Report(() if result is None else (result,)) for result in (old, new)]
    return compare_reports(*reports)


def group(comparison: Comparison) -> str:
    (name,) = [name for name, changes in comparison.groups.items() if changes]
    return name


FAILED = sample_result(status="fail")
KNOWN = replace(FAILED, expected="known, until 2030-01-01")


@pytest.mark.parametrize(
    ("old", "new", "wanted", "code"),
    [
        (sample_result(), sample_result(), "same", 0),
        (sample_result(), FAILED, "worse", 1),
        (sample_result(), sample_result(status="inconclusive"), "worse", 1),
        (sample_result(), sample_result(status="not_run"), "worse", 0),
        (sample_result(), KNOWN, "worse", 0),
        (KNOWN, FAILED, "worse", 1),
        (FAILED, FAILED, "same", 0),
        (sample_result(status="inconclusive"), FAILED, "worse", 0),
        (FAILED, sample_result(), "better", 0),
        (FAILED, KNOWN, "better", 0),
        (None, sample_result(), "new", 0),
        (None, FAILED, "new", 1),
        (None, KNOWN, "new", 0),
        (FAILED, None, "gone", 0),
        (with_value(1e-6), with_value(2.9e-6), "same", 0),
        (with_value(1e-6), with_value(4e-6), "worse", 0),
        (with_value(4e-6), with_value(1e-6), "better", 0),
        (with_value(1e-6), with_value(4e-6, precision="fp16"), "same", 0),
    ],
)
def test_results_are_told_apart(old: Result | None, new: Result | None, wanted: str, code: int) -> None:
    comparison = compared(old, new)
    assert (group(comparison), comparison.exit_code()) == (wanted, code)


def test_sentences_say_what_changed() -> None:
    def texts(old: Result, new: Result) -> tuple[str, ...]:
        (change,) = next(changes for changes in compared(old, new).groups.values() if changes)
        return change.texts

    assert texts(with_value(1e-6), with_value(4e-6)) == (
        "output.rel_l2 grew 4 times, from 1e-06 to 4e-06, within its bound 5e-06",
    )
    assert texts(with_value(4e-6), with_value(1e-6)) == ("output.rel_l2 fell 4 times, from 4e-06 to 1e-06",)
    assert texts(with_value(1e-6), with_value(float("nan"))) == ("output.rel_l2 was 1e-06, and is nan now",)
    assert texts(with_value(1e-6), replace(with_value(0), metrics=(sample_result().metrics[1],))) == (
        "output.rel_l2 was measured then, and is not now",
        "output.neighbour_order is measured now, and was not then",
    )
    assert texts(with_value(1e-6), with_value(1e-6, precision="fp16")) == (
        "it was of precision fp32, and is of fp16: values are not compared",
    )
    assert texts(sample_result(), FAILED)[0] == "it was pass, and is fail now: a text"


def test_relations_timings_and_repeated_results_are_compared_with_their_own_kind() -> None:
    relation = sample_result(reference="itself", stage="padding")
    timing = sample_result(reference="timing")
    old = Report((sample_result(), relation, timing, sample_result()))
    new = Report((timing, sample_result(), replace(relation, status="fail"), sample_result()))
    comparison = compare_reports(old, new)
    assert [change.name for change in comparison.worse] == ["c-ort, padding"]
    assert len(comparison.same) == 3


def test_environment_and_simulated_runtimes_are_told() -> None:
    old = Report((sample_result(runtime="sim", simulated=True),), {"versions": {"torch": "2.9"}, "cards": []})
    comparison = compare_reports(old, replace(old, environment={"versions": {"torch": "2.10", "onnx": "1"}}))
    assert comparison.environment == (
        ("versions.torch", "2.9", "2.10"),
        ("cards", "", None),
        ("versions.onnx", None, "1"),
    )
    assert comparison.same[0].name == "c-sim (simulated)"


def test_page_escapes_hostile_texts() -> None:
    for text in HOSTILE[:4]:
        results = [sample_result(text, text=text), sample_result(text, status="fail", text=text)]
        old, new = (Report((result,), {text: text * at}) for at, result in enumerate(results, start=1))
        page = html_comparison(compare_reports(old, new), (text, text))
        assert text not in page
        assert page.count("<script>") == 1


def test_command_prints_and_writes_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, page = tmp_path / "old", tmp_path / "new", tmp_path / "pages" / "changes.html"
    Report((sample_result(),)).write(old)
    Report((FAILED, sample_result("d"))).write(new)
    assert run_command(["compare", str(old), str(new / "report.json"), "--html", str(page)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("1 worse, 0 better, 1 new, 0 gone, 0 same\n")
    assert "  c-ort: Proved -> Disproved\n" in printed
    assert "New failures: c-ort." in printed
    assert "Disproved" in page.read_text(encoding="utf-8")
    assert run_command(["compare", str(new), str(old), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert ([item["name"] for item in plain["better"]], plain["new_failures"]) == (["c-ort"], [])
    assert [item["name"] for item in plain["gone"]] == ["d-ort"]


def damaged(change: Any) -> str:
    plain = sample_report().plain()
    change(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"schema": 1}',
        '{"schema": 2, "results": []}',
        '{"schema": 1, "results": [1]}',
        '{"schema": 1, "results": {}}',
        '{"schema": 1, "results": [], "environment": []}',
        '{"schema": 1, "results": [], "unwritten": [1]}',
        '{"schema": 1, "name": "v1", "environment": {}, "results": [{"case": "a", "runtime": "b", "status": "pass"}]}',
        damaged(lambda plain: plain["results"][0].update(case=["x"])),
        damaged(lambda plain: plain["results"][0].update(reason=None)),
        damaged(lambda plain: plain["results"][0].update(findings=[{}])),
        damaged(lambda plain: plain["results"][0].update(texts=[{"text": "x"}])),
        damaged(lambda plain: plain["results"][0].update(coverage={"planned": "x", "compared": 0})),
        damaged(lambda plain: plain["results"][0]["metrics"][0].update(worst=3)),
        damaged(lambda plain: plain["results"][0]["metrics"][0].update(by_row=3)),
        damaged(lambda plain: plain["results"][2].update(explanation=[])),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    good = tmp_path / "good"
    sample_report().write(good)
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        read_report(file)
    assert run_command(["compare", str(good), str(file)]) == 2
    assert str(file) in capsys.readouterr().err
