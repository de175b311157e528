# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qeff_validate.errors import IncomparableError
from qeff_validate.report.explanation import BoundaryError, Explanation, LayerError, ProgramSearch, StageShare
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result

EXPLANATION = Explanation(
    summary="layer encoder.layer.1, weight row 77 is zero (export)",
    stages=(StageShare("export", 1.25, float("inf")), StageShare("runtime", -0.25, 0.1)),
    stage="export",
    layers=(LayerError("encoder.layer.1", "n1", "Add", float("inf"), 0.5, 1e-7),),
    module="encoder.layer.1",
    finding="weight row 77 is zero",
    rows=(3, 4),
    seconds=1.5,
    row="row 3 ('text', step 2)",
    program=ProgramSearch(3, float("inf"), (BoundaryError("encoder.layer.0", 1e-3, 2e-3),)),
    repro="bundle",
    repro_note="2 nodes",
)


def test_explanation_survives_json_with_values_that_are_not_finite() -> None:
    result = Result("small", "ort", "fail", planned=1, compared=1, explanation=EXPLANATION)
    plain = json.loads(json.dumps(Report((result,)).plain(), allow_nan=False))
    assert plain["results"][0]["explanation"]["stages"][0] == {"name": "export", "share": 1.25, "error": "inf"}
    assert Report.from_plain(plain).results[0].explanation == EXPLANATION


def test_explanation_of_an_earlier_report_is_read() -> None:
    plain = EXPLANATION.to_plain()
    for name in ("row", "program", "repro", "repro_note"):
        del plain[name]
    assert Explanation.from_plain(plain) == replace(EXPLANATION, row="", program=None, repro=None, repro_note="")


def test_result_without_an_explanation_has_no_such_key() -> None:
    plain = Result("small", "ort", "pass").plain()
    assert "explanation" not in plain
    assert Result.from_plain(plain).explanation is None


def test_explanation_with_a_missing_value_is_no_result() -> None:
    plain = Result("small", "ort", "fail", explanation=EXPLANATION).plain()
    del plain["explanation"]["stages"][0]["share"]
    with pytest.raises(IncomparableError, match="no result of report"):
        Result.from_plain(plain)


def test_last_line_of_a_report_says_where() -> None:
    result = Result("small", "ort", "fail", planned=1, compared=1, explanation=EXPLANATION)
    assert Report((result,)).closing()[-1] == "small-ort: layer encoder.layer.1, weight row 77 is zero (export)"
