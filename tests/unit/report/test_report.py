# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_samples import sample_report

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult, Power
from qeff_validate.errors import IncomparableError, ValidateError
from qeff_validate.report.explanation import Explanation
from qeff_validate.report.report import Report, json_report
from qeff_validate.report.result import Precheck, Result, finite
from qeff_validate.report.writers import write_texts


def result(status: Any = "pass", runtime: str = "ort", **more: Any) -> Result:
    rows = {"planned": 3, "compared": 3} if status in ("pass", "fail") else {}
    return Result(case="c", runtime=runtime, status=status, precision="fp32", **{**rows, **more})


CODES = [
    (["pass"], 0),
    (["pass", "not_run"], 0),
    (["fail"], 1),
    (["pass", "inconclusive"], 1),
    (["pass", "error"], 3),
    (["fail", "error"], 1),
    (["not_run"], 3),
    (["error"], 3),
    ([], 3),
]


@pytest.mark.parametrize(("statuses", "code"), CODES, ids=str)
def test_exit_codes(statuses: list[str], code: int) -> None:
    report = Report(tuple(result(status) for status in statuses))
    assert report.exit_code() == code
    assert report.passed == (code == 0)


def test_a_config_error_comes_before_a_mismatch_and_a_mismatch_before_an_error() -> None:
    config = result("error", stage="config")
    assert Report((result("fail"), config, result("error"))).exit_code() == 2
    assert Report((result("fail"), result("error"))).exit_code() == 1


def test_a_required_runtime_must_have_run() -> None:
    report = Report((result(), result("not_run", "ai100")))
    assert report.exit_code() == 0
    assert report.exit_code(require=["ai100"]) == 3
    assert report.exit_code(require=["ort"]) == 0
    assert report.exit_code(require=["sim"]) == 3, "a required runtime that nobody asked for did not run either"


def test_inconclusive_can_be_allowed_but_nothing_compared_can_not() -> None:
    assert Report((result(), result("inconclusive"))).exit_code(allow_inconclusive=True) == 0
    assert Report((result("inconclusive"),)).exit_code(allow_inconclusive=True) == 3


def judged(value: float, bound: float | None = 1e-3) -> GateResult:
    metric = Metric("output.rel_l2", value, {"row": 2, "text": "a | b"})
    return GateResult(metric, None if bound is None else Bound(bound, "fallback", "x"))


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_the_json_is_strict_and_holds_non_finite_numbers_as_strings(tmp_path: Path, value: float, text: str) -> None:
    report = Report((result("fail", metrics=(judged(value),)),), {"versions": {"python": "3"}})
    report.write(tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    plain = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert plain["schema"] == 1
    assert set(plain) == {"schema", "environment", "results", "summary", "unwritten"}
    (one,) = plain["results"]
    assert set(one) >= {"case", "runtime", "reference", "precision", "simulated", "status", "reason", "stage"}
    assert set(one) >= {"metrics", "coverage", "timings_s", "artifact"}
    assert one["metrics"][0]["value"] == text
    assert one["metrics"][0]["passed"] is False
    assert one["coverage"] == {"planned": 3, "compared": 3}
    assert plain["summary"]["fail"] == 1
    assert text in (tmp_path / "report.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_count_that_is_an_integer_is_written_as_one() -> None:
    from qeff_validate.report.markdown import markdown_lines

    assert "rel_l2 7 of " in "\n".join(markdown_lines((result("fail", metrics=(judged(7),)),)))


def test_what_is_only_shown_never_fails() -> None:
    assert judged(math.inf, None).passed
    assert not judged(math.nan, 1e-3).passed


def test_markdown_cells_cannot_break_the_table() -> None:
    text = Report((result(metrics=(judged(1e-4),)),))
    from qeff_validate.report.markdown import markdown_lines

    lines = "\n".join(markdown_lines(text.results)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_the_closing_says_what_was_proved_and_what_was_not() -> None:
    report = Report((result(), result("pass", "sim", simulated=True), result("fail", "torch")))
    text = " ".join(report.closing())
    assert "Proved: ort agrees" in text
    assert "a simulated AI 100" in text
    assert "Disproved: c-torch (fail)" in text
    assert "Not proved: anything on a real AI 100 card" in text
    real = Report((result("pass", "ai100"),))
    assert "Not proved" not in " ".join(real.closing())


def test_statuses_and_rows_are_counted() -> None:
    summary = Report((result(), result("not_run"))).plain()["summary"]
    assert (summary["pass"], summary["not_run"], summary["rows_compared"]) == (1, 1, 3)


def full_report() -> Report:
    floor = Bound(1e-3, "floor", "3 x 3e-4", 2e-4)
    metrics = (judged(math.nan), judged(0.5, None), GateResult(Metric("output.cosine", 1e-4, {"row": 1}), floor))
    one = result(
        "fail", metrics=metrics, power=Power(4, ("small",)), reason="r", stage="compare", notes=("n",), findings=("f",),
        prechecks=(Precheck("weights", "same"),), timings_s={"load": 0.5}, artifact={"kind": "onnx"}, expected="known",
    )  # fmt: skip
    return Report((one, result("not_run", "ai100", reason="no card")), {"seed": 0}, ("not recorded",))


def test_plain_form_is_read_back() -> None:
    plain = json.loads(json.dumps(full_report().plain()))
    assert Report.from_plain(plain).plain() == plain
    assert math.isnan(Report.from_plain(plain).results[0].metrics[0].metric.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda plain: plain.update(schema=2),
        lambda plain: plain["results"][0].pop("coverage"),
        lambda plain: plain["results"][0].update(status="good"),
        lambda plain: plain["results"][0]["metrics"][0].update(value="many"),
    ],
)
def test_plain_form_of_something_else_is_refused(damage: Any) -> None:
    plain = full_report().plain()
    damage(plain)
    with pytest.raises(IncomparableError):
        Report.from_plain(plain)


def test_notebook_gets_one_table_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report((result(metrics=(judged(1e-4),)), result("fail", "sim", simulated=True, reason="<script>")))
    page = report._repr_html_()
    assert capsys.readouterr() == ("", ""), "rich would show it a second time"
    assert page.count("<table") == 1
    assert page.count("<tr") == 3
    assert "sim (simulated)" in page
    assert "a | b" in page
    assert "Disproved: c-sim (fail)." in page
    assert "ort" in str(report)


def test_notebook_holds_the_charts_in_a_frame_of_their_own_unless_they_are_too_many() -> None:
    import html
    import re

    from qeff_validate.report.html_report import html_report
    from qeff_validate.report.report import MOST_IN_NOTEBOOK

    report = Report((result(metrics=(judged(1e-4),)),))
    (frame,) = re.findall(r'<details.*<iframe srcdoc="([^"]*)" sandbox="allow-scripts"', report._repr_html_())
    assert html.unescape(frame) == "".join(html_report(report))
    many = Report((result(),) * (MOST_IN_NOTEBOOK + 1))
    assert "iframe" not in many._repr_html_()


def test_notebook_escapes_what_it_shows() -> None:
    page = Report((result(runtime="<script>alert(1)</script>"),))._repr_html_()
    assert "<script" not in page


def test_markdown_folds_reasons_and_environment_and_opens_failures() -> None:
    from qeff_validate.report.markdown import markdown_lines

    explanation = Explanation("layer.1 is wrong")
    failed = result("fail", reason="rel_l2 <= 1 </details>", stage="compare", explanation=explanation)
    results = failed, result("not_run", "ai100", reason="no card")
    text = "\n".join(markdown_lines(results, (), {"versions": {"torch": "2"}}))
    assert "<details open><summary><b>c-ort</b>: Disproved (fail at compare)</summary>" in text
    assert "**Where it comes from:** layer.1 is wrong" in text
    assert "rel_l2 &lt;= 1 &lt;/details&gt;" in text
    assert "<details><summary><b>c-ai100</b>: Not run (not_run)</summary>\n\nno card\n" in text
    assert "| versions.torch | 2 |" in text
    assert text.count("<details") == text.count("</details>") == 3


def test_reason_of_a_failure_has_a_line_for_each_metric() -> None:
    reason = "rel_l2 0.5, allowed 0.1; cosine 0.2, allowed 0.1"
    assert Report((result("fail", reason=reason),)).problems() == [
        "c-ort: fail: rel_l2 0.5, allowed 0.1;\n  cosine 0.2, allowed 0.1"
    ]
    assert Report((result("error", reason="gone; run again"),)).problems() == ["c-ort: error: gone; run again"]


@pytest.mark.parametrize("report", [Report(()), sample_report(5), Report((), {"results": ["\u2028\n"]}, ("full",))])
def test_report_json_is_the_plain_form(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert text == json.dumps(report.plain(), indent=1, ensure_ascii=False) + "\n"


def test_writing_takes_no_memory_by_result_beyond_that_of_the_results(tmp_path: Path) -> None:
    """1,000 results in one text took 190 MB, as one character beyond U+FFFF makes four bytes of each."""
    report = sample_report(1000, text="\U0001f600")
    tracemalloc.start()
    try:
        write_texts(tmp_path, {"report.json": json_report(report)})
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("error", [RuntimeError, ValidateError, OSError])
def test_writer_that_fails_loses_no_other_report(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(report: Report) -> Iterator[str]:
        yield "begin"
        raise error(f"cannot draw {len(report.results)} results")

    monkeypatch.setattr("qeff_validate.report.html_report.html_report", broken)
    with pytest.raises(ValidateError, match=r"'html' .* cannot draw 1 results"):
        Report((result(),)).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_finite_goes_through_everything() -> None:
    assert finite({1: [math.nan, (math.inf, 2)]}) == {"1": ["nan", ["inf", 2]]}


def own(value: float, **more: Any) -> Result:
    bound = Bound(0.9, "case", "the card is new", 1e-6)
    gate = GateResult(Metric("output.rel_l2", value, {"row": 0, "text": "a"}), bound)
    return result(metrics=(gate,), **more)


def test_pass_within_a_bound_of_the_cases_own_is_never_proved() -> None:
    closing = Report((own(0.1, power=Power(16, ("a", "b"))),)).closing()
    assert not any(line.startswith("Proved") for line in closing)
    assert closing[0] == (
        "Not proved: c-ort passes within the case's own bound rel_l2 <= 0.9, 900,000 x the noise (why: the card is new)"
        "; 2 of 16 faults would pass."
    )


def test_results_that_are_neither_are_not_settled() -> None:
    closing = Report((result("inconclusive"), result("error", "sim"))).closing()
    assert "Not settled: c-ort (inconclusive), c-sim (error)." in closing


def test_table_of_eighty_columns_loses_no_digit(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from rich.console import Console

    gate = GateResult(
        Metric("output.max_abs_rms", 5.04e-06, {"row": 0, "text": "a text"}), Bound(5e-5, "floor", "x", 1e-6)
    )
    report = Report((result(metrics=(gate,), power=Power(16)),))
    for width in (80, 200):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(report.table(width=width))
        text = console.file.getvalue()
        assert "max_abs_rms 5.04e-06 of 5.00e-05" in text
        assert max(map(len, text.splitlines())) <= width
    assert "worst row" in text, "a wide table has all columns"


@pytest.mark.parametrize(
    ("metrics", "cell"),
    [
        ([("flips", 0.0, 0.0), ("cosine", 1e-12, 1e-9)], "1-cosine 1.00e-12 of 1.00e-09"),
        ([("flips", 0.0, 0.0)], "flips 0 of 0"),
        ([("flips", 2.0, 0.0), ("cosine", 1e-12, 1e-9)], "flips 2 of 0"),
    ],
)
def test_nearest_bound_is_the_nearest_and_exact_ones_show(metrics: list[Any], cell: str) -> None:
    from qeff_validate.report.text import row_cells

    gates = tuple(
        GateResult(Metric(f"output.{name}", value, {"row": 0, "text": "a"}), Bound(bound, "exact", "x"))
        for name, value, bound in metrics
    )
    assert row_cells(result(metrics=gates))[4] == cell


def test_sample_in_the_readme_has_the_columns_and_sentences_of_a_report() -> None:
    import re

    from qeff_validate.report.text import HEAD

    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    sample = readme.partition("```text\n")[2].partition("```")[0].splitlines()
    assert tuple(re.split(r"  +", sample[0])) == HEAD
    assert all(len(re.split(r"  +", line)) == len(HEAD) for line in sample[1:4])
    report = Report((result("pass", "sim", simulated=True),))
    assert sample[-1] == report.closing()[-1]
    assert (
        sample[-2].partition(" bounds on ")[0].replace("fp16", "fp32")
        == report.closing()[0].partition(" bounds on ")[0]
    )
