# SPDX-License-Identifier: Apache-2.0
"""Known failures: reported, dated, and strict."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from processes import forked_pytest

import qeff_validate as qv
from qeff_validate.config.case import Expect
from qeff_validate.engine import load
from qeff_validate.pipeline.expectations import with_expectation
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result

LAST = date(2026, 12, 31)


def judged(status: Any, today: date = LAST, expected: Any = "fail", runtime: str = "ort") -> Result:
    expect = Expect(runtime="ort", status=expected, reason="upstream bug 7", until=LAST)
    case = qv.Case(name="c", source="random:bert", expect=[expect])
    return with_expectation(case, Result(case="c", runtime=runtime, status=status, reason="rel_l2", compared=3), today)


def test_an_expected_failure_is_kept_visible_and_does_not_fail_the_run() -> None:
    result = judged("fail")
    assert (result.status, result.expected) == ("fail", "upstream bug 7, until 2026-12-31")
    report = Report((result,))
    assert report.exit_code() == 0
    assert "expected fail" in " ".join(report.closing())


def test_an_unexpected_pass_is_a_failure_that_says_what_to_do() -> None:
    result = judged("pass")
    assert (result.status, result.expected) == ("fail", None)
    assert "take the expectation out" in result.reason


def test_an_expired_one_is_a_failure_the_day_after() -> None:
    result = judged("fail", date(2027, 1, 1))
    assert result.expected is None
    assert "until 2026-12-31 only; rel_l2" in result.reason
    assert Report((result,)).exit_code() == 1


@pytest.mark.parametrize(("status", "expected"), [("error", "fail"), ("fail", "error"), ("inconclusive", "fail")])
def test_another_status_than_the_expected_one_counts(status: Any, expected: Any) -> None:
    assert judged(status, expected=expected).expected is None


def test_other_runtimes_and_what_did_not_run_are_left_alone() -> None:
    assert judged("pass", runtime="sim").status == "pass"
    assert judged("not_run").status == "not_run"


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"runtime": "ort", "reason": "x"}, "until"),
        ({"runtime": "ort", "until": "2027-01-01"}, "reason"),
        ({"runtime": "ort", "reason": "", "until": "2027-01-01"}, "at least 1 character"),
        ({"runtime": "otr", "reason": "x", "until": "2027-01-01"}, "Did you mean 'ort'"),
        ({"runtime": "ort", "reason": "x", "until": "soon"}, "date"),
        ([{"runtime": "ort", "reason": "x", "until": "2027-01-01"}] * 2, "named twice"),
    ],
)
def test_a_wrong_expectation_is_a_config_error(tmp_path: Path, expect: Any, words: str) -> None:
    text = json.dumps({"cases": [{"name": "c", "source": "random:bert", "expect": expect}]})
    (tmp_path / "c.yaml").write_text(text.replace('"2027-01-01"', "2027-01-01"))
    with pytest.raises(qv.ConfigError, match=words):
        load([tmp_path / "c.yaml"])


def test_pytest_shows_it_as_an_expected_failure(pytester: pytest.Pytester) -> None:
    expect = "{runtime: ort, reason: too tight, until: 2999-01-01}"
    tolerance = "{ort: {rel_l2: 0, why: nothing is that exact}}"
    pytester.makefile(
        ".yaml",
        c=f"cases:\n  - {{name: c, source: 'random:bert', options: {{seq_len: [48, 64]}}, expect: {expect},"
        f" tolerance: {tolerance}}}",
    )
    options = ("--qv-config", "c.yaml", "--qv-runtimes", "ort", "-p", "no:cacheprovider", "-rx")
    result = forked_pytest(pytester, *options, "--pyargs", "qeff_validate.suites.test_embedding", timeout=120)
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["*fail, expected: too tight, until 2999-01-01*"])
