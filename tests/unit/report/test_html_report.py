# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import pytest
from report_samples import EXPLANATION, HOSTILE, PLAIN_EXPLANATION, sample_report, sample_result

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import ErrorsByRow, Metric
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.report.charts import LogScale, bound_mark, bound_scale, layer_bars, stage_bars, strip
from qeff_validate.report.explanation import Explanation
from qeff_validate.report.html_report import html_report as html_pieces
from qeff_validate.report.report import Report


def html_report(report: Report) -> str:
    """Return the whole page."""
    return "".join(html_pieces(report))


class Elements(HTMLParser):
    """Collects the elements of a page, and the text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._raw = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data


def test_page_depends_on_what_report_json_holds_alone() -> None:
    report = sample_report()
    stored = Report.from_plain(json.loads(json.dumps(report.plain())))
    assert html_report(report) == html_report(stored)


def test_page_shows_each_part_of_a_result() -> None:
    text = " ".join(Elements(html_report(sample_report())).text.split())
    for shown in (
        "✗ Disproved", "✓ Proved", "? Not settled", "– Not run", "sim (simulated)", "fail at compare:",
        "3 of 4 faults", "differs", "versions.torch", "load (s)", "worst rows", "4.00e-03", "8e+02 × bound",
        "layer.1, weight row 77 is zero (export)", "105 %", "2e+04",
    ):  # fmt: skip
        assert shown.lower() in text.lower(), shown


def test_simulated_runtime_is_called_simulated_wherever_it_stands() -> None:
    page = html_report(Report((sample_result(runtime="sim", simulated=True),)))
    names = re.findall(r">\s*sim\b([^<]*)<|\bon</span> sim\b([^<]*)<|value=\"sim\b([^\"]*)\"", page)
    assert len(names) >= 3
    assert all("(simulated)" in "".join(rest) or "a simulated AI 100" in "".join(rest) for rest in names), names


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text: str) -> None:
    hostile = sample_report(5, text)
    results = [replace(item, case=text, explanation=_hostile(text)) for item in hostile.results]
    page = html_report(replace(hostile, results=tuple(results), unwritten=(text,)))
    plain, elements = Elements(html_report(_same_shape())), Elements(page)
    assert set(elements.tags) == set(plain.tags), "no element comes from a text"
    assert elements.tags.count("script") == elements.tags.count("style") == 1
    assert {name for name, _ in elements.attributes} <= {name for name, _ in plain.attributes}
    assert text.replace("\x00", "") in elements.text.replace("\x00", "")
    assert not any(value.startswith(("http", "//", "javascript")) for _, value in elements.attributes)


def _same_shape() -> Report:
    report = sample_report(5)
    return replace(
        report,
        results=tuple(replace(item, explanation=EXPLANATION) for item in report.results),
        unwritten=("a",),
    )


def _hostile(text: str) -> Explanation:
    """Return the explanation with each of its texts replaced."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return text if isinstance(value, str) and value not in ("nan", "inf") else value

    return Explanation.from_plain(replaced(PLAIN_EXPLANATION))


@pytest.mark.parametrize("explanation", [Explanation("s"), replace(EXPLANATION, layers=(), module=None, finding="")])
def test_explanation_may_lack_any_part(explanation: Explanation) -> None:
    assert "Where it comes from" in html_report(Report((sample_result(status="fail", explanation=explanation),)))
    assert "Where it comes from" not in html_report(Report((sample_result(status="fail"),)))


def test_report_without_results_or_environment_is_a_page() -> None:
    text = Elements(html_report(Report(()))).text
    assert "There are no results" in text
    assert "It was not recorded" in text


# --- charts ----------------------------------------------------------------------------------------


def test_log_scale_holds_values_and_clips_what_is_beyond() -> None:
    scale = LogScale.around([1e-3, 5.0])
    assert (scale.low, scale.high) == (1e-3, 10.0)
    assert [scale.at(value) for value in (1e-3, 0.1, 10.0)] == [0.0, 50.0, 100.0]
    assert [scale.at(value) for value in (0.0, math.inf, math.nan)] == [0.0, 100.0, 100.0]
    assert LogScale.around([1e-30, 1e30]) == LogScale(1e-6, 1e6)


def gate(value: float, bound: float, floor: float | None = None, rows: tuple[float, ...] = ()) -> GateResult:
    by_row = ErrorsByRow(rows) if rows else None
    return GateResult(Metric("output.rel_l2", value, {}, by_row), Bound(bound, "floor", "x", floor))


def test_value_and_floor_are_placed_beside_the_bound() -> None:
    gates = [gate(1e-4, 1e-3, 1e-5), gate(1e-2, 1e-3)]
    scale = bound_scale(gates)
    within, beyond = (bound_mark(item, scale) for item in gates)
    assert within is not None
    assert beyond is not None
    assert within.floor is not None
    assert within.floor < within.value < within.bound == beyond.bound < beyond.value
    assert bound_mark(gate(0.0, 0.0), scale) is None


def test_strip_tells_rows_within_the_bound_from_others_and_from_missing_ones() -> None:
    made = strip(gate(4.0, 1.0, rows=(0.5, 4.0, math.nan, 0.0)))
    assert made is not None
    assert (made.width, made.worst, made.values) == (4, 1, [0.5, 4.0, None, 0.0])
    assert [path.count("M") for path in (made.within, made.beyond, made.missing)] == [2, 1, 1]
    assert strip(gate(4.0, 1.0)) is None


def test_stages_and_layers_are_drawn_on_one_scale_each() -> None:
    zero, stages = stage_bars(EXPLANATION)
    assert [bar.named for bar in stages] == [False, True, False]
    assert stages[0].start + stages[0].width == pytest.approx(zero) == pytest.approx(stages[1].start)
    layers = layer_bars(EXPLANATION)
    assert [bar.named for bar in layers] == [False, True, False]
    assert layers[1].local_at > layers[0].local_at == layers[1].inherited_at == layers[0].floor_at


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    if chromium.PROGRAM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with chromium.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def open_sample(tab: chromium.Page, folder: Path, count: int = 5) -> None:
    """Open the page of the sample report."""
    file = folder / "report.html"
    file.write_text(html_report(sample_report(count)), encoding="utf-8")
    tab.open(file)


def shown(tab: chromium.Page) -> Any:
    return tab.value("document.querySelectorAll('details.result:not([hidden])').length")


def tick(tab: chromium.Page, name: str, value: str) -> None:
    tab.value(f"document.querySelector(\"input[name={name}][value='{value}']\").click()")


def search(tab: chromium.Page, text: str) -> None:
    tab.value(
        f"(document.querySelector('[name=text]').value = {json.dumps(text)},"
        " document.getElementById('filters').dispatchEvent(new Event('input', {bubbles: true})))"
    )


@pytest.mark.integration
@pytest.mark.parametrize("count", [5, 500])
def test_filters_work_and_nothing_is_logged_or_requested(tab: chromium.Page, tmp_path: Path, count: int) -> None:
    open_sample(tab, tmp_path, count)
    each = count // 5
    assert shown(tab) == count
    tick(tab, "word", "Disproved")
    assert shown(tab) == each
    tick(tab, "word", "Not run")
    assert shown(tab) == 2 * each
    tick(tab, "runtime", "ai100")
    assert shown(tab) == each
    assert tab.value("document.querySelectorAll('#overview a:not([hidden])').length") == each
    assert tab.value("document.getElementById('shown').textContent") == f"{each} of {count} results"
    tab.press("Escape")
    assert shown(tab) == count
    search(tab, "case-0 SIMULATED")
    assert shown(tab) == 1
    search(tab, "nowhere")
    assert shown(tab) == 0
    assert tab.value("document.getElementById('none').hidden") is False
    tab.value("document.querySelector('button[type=reset]').click()")
    assert shown(tab) == count
    assert tab.complaints() == []


@pytest.mark.integration
def test_page_is_used_with_the_keyboard(tab: chromium.Page, tmp_path: Path) -> None:
    open_sample(tab, tmp_path)
    focused = "(document.activeElement.closest('details') || {}).id"
    tab.press("j")
    tab.press("j")
    assert tab.value(focused) == "r2"
    tab.press("k")
    assert tab.value(focused) == "r1"
    tab.press("o")
    assert tab.value("document.querySelectorAll('details.result:not([open])').length") == 0
    tab.press("/")
    tab.press("j")
    assert tab.value("document.querySelector('[name=text]').value") == "j"
    tab.press("Escape")
    tab.value("document.querySelector('#r1 .strip').focus()")
    assert tab.value("document.querySelector('#r1 .readout').textContent").startswith("row 1: 3.00e-6, 0.60 × bound")
    tab.press("End")
    assert "row 3: no error" in tab.value("document.querySelector('#r1 .readout').textContent")
    tab.value("document.querySelector('a[data-result=\"3\"]').click()")
    assert tab.value("location.hash") == "#r3"
    assert tab.complaints() == []


@pytest.mark.integration
def test_hostile_texts_neither_run_nor_break_a_narrow_page(tab: chromium.Page, tmp_path: Path) -> None:
    results = [sample_result(text, status="fail", text=text, explanation=_hostile(text)) for text in HOSTILE]
    file = tmp_path / "report.html"
    Report(tuple(results), {}).write(tmp_path)
    tab.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    tab.open(file)
    tab.press("o")
    assert tab.value("document.querySelectorAll('details.result[open]').length") == len(HOSTILE)
    assert tab.value("window.hurt === undefined")
    assert tab.value("document.documentElement.scrollWidth") <= 400
    assert tab.complaints() == []


@pytest.mark.integration
def test_what_did_not_pass_is_printed_with_its_details(tab: chromium.Page, tmp_path: Path) -> None:
    open_sample(tab, tmp_path)
    opened = "Array.from(document.querySelectorAll('details.result[open]'), (item) => item.id).join()"
    assert tab.value(opened) == "r3"
    tab.value("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.value(opened) == "r3,r5"
    tab.value("window.dispatchEvent(new Event('afterprint'))")
    assert tab.value(opened) == "r3"


@pytest.mark.integration
def test_browser_tells_what_a_bad_page_does(tab: chromium.Page, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<img src=missing.png><script>console.log(1); undefined.x</script>", encoding="utf-8")
    tab.open(file)
    complaints = " ".join(tab.complaints())
    assert "missing.png" in complaints
    assert "consoleAPICalled" in complaints or '"log"' in complaints
    assert "TypeError" in complaints
