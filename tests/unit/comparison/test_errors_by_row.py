# SPDX-License-Identifier: Apache-2.0
"""The errors by row in a report: each stands at its row, and there are at most `MOST_ROW_ERRORS`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qeff_validate.comparison.bounds import bounds_for
from qeff_validate.comparison.logit_metrics import Text, judge_logits, logit_bounds
from qeff_validate.comparison.metric import MOST_ROW_ERRORS, ErrorsByRow
from qeff_validate.comparison.verdict import MOST_TEXT, Rows, Verdict, compare, row_texts
from qeff_validate.report.result import Result


def outputs(rows: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)


def verdict(actual: np.ndarray, rows: Rows | None = None) -> Verdict:
    labels = [f"text {row}" for row in range(len(actual))]
    reference = {"output": outputs(len(actual))}
    return compare(reference, {"output": actual}, bounds_for("fp16", override={}), rows=rows or Rows(labels))


def errors(made: Verdict, name: str) -> ErrorsByRow:
    by_row = next(item.metric.by_row for item in made.metrics if item.metric.name.endswith(name))
    assert by_row is not None
    return by_row


def test_each_error_stands_at_its_row_and_the_greatest_is_the_value() -> None:
    actual = outputs()
    actual[4] *= np.float32(1.5)
    made = verdict(actual)
    for item in made.metrics:
        if item.metric.by_row is not None:
            assert np.nanmax(item.metric.by_row.values) == item.metric.value
    assert errors(made, "rel_l2").values == pytest.approx([0, 0, 0, 0, 0.5, 0], abs=1e-6)
    assert [text.text for text in made.texts] == [f"text {row}" for row in range(6)]


def test_rows_that_are_not_measured_have_no_error_and_shift_no_other() -> None:
    actual = outputs()
    actual[1] = np.nan
    actual[4] *= np.float32(1.5)
    labels = [f"text {row}" for row in range(6)]
    values = errors(verdict(actual, Rows(labels, frozenset({2}), zeros=False)), "rel_l2").values
    assert [math.isnan(value) for value in values] == [False, True, True, False, False, False]
    assert values[4] == pytest.approx(0.5, abs=1e-6)


def test_tokens_have_their_errors_at_their_places_too() -> None:
    reference, actual = outputs(5), outputs(5)
    actual[3] = np.nan
    actual[4, 0] += 1
    results = judge_logits(
        reference,
        actual,
        logit_bounds("fp16", override={}),
        labels=[f"p +{step}" for step in range(5)],
        texts=[Text("p", range(5))],
        eos=frozenset(),
        finite=[0, 1, 2, 4],
    )
    values = next(item.metric.by_row for item in results if item.metric.name == "logits.kl_max").values
    assert math.isnan(values[3])
    assert values[4] > 0 == values[0]


@pytest.mark.parametrize("rows", [1, MOST_ROW_ERRORS, MOST_ROW_ERRORS + 1, 12_345])
def test_there_are_never_too_many_and_the_greatest_is_kept(rows: int) -> None:
    given = np.random.default_rng(rows).random(rows)
    kept = ErrorsByRow.of(given, range(rows), rows)
    assert len(kept.values) <= MOST_ROW_ERRORS
    assert (len(kept.values) - 1) * kept.rows_each < rows <= len(kept.values) * kept.rows_each
    assert kept.values[int(given.argmax()) // kept.rows_each] == given.max()
    assert kept.bounded() == kept


def test_group_without_a_measured_row_has_no_error_and_others_lose_none() -> None:
    kept = ErrorsByRow.of([3.0, 1.0], [0, 1], 2 * MOST_ROW_ERRORS)
    assert kept.rows_each == 2
    assert kept.values[0] == 3.0
    assert all(math.isnan(value) for value in kept.values[1:])


def test_long_texts_are_cut_and_too_many_are_left_out() -> None:
    (made,) = row_texts([("x" * 1000, 7)])
    assert (len(made.text), made.rows) == (MOST_TEXT, 7)
    assert row_texts([("x", 1)] * (MOST_ROW_ERRORS + 1)) == ()


def test_plain_form_is_small_and_read_back() -> None:
    rows = 5000
    made = verdict(outputs(rows) * np.float32(1.001))
    result = Result("c", "ort", made.status, metrics=made.metrics, texts=made.texts)
    plain = json.loads(json.dumps(result.plain()))
    kept = [item["by_row"]["errors"] for item in plain["metrics"] if "by_row" in item]
    assert len(kept) == 4, "of each metric with a bound and an error for each row"
    assert all(len(values) <= MOST_ROW_ERRORS for values in kept)
    assert len(json.dumps(plain)) < 20_000
    assert Result.from_plain(plain).plain() == plain
