# SPDX-License-Identifier: Apache-2.0
"""Scores: their errors, the order of documents and labels, ties, and verdicts on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qeff_validate.comparison.score_metrics import order_metrics, score_errors
from qeff_validate.models.classification.verdict import judge_scores
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import ComparisonContext


def orders(reference: Any, actual: Any, groups: list[int], gap: float = 0.1) -> dict[str, float]:
    metrics = order_metrics(np.array(reference, np.float32), np.array(actual, np.float32), groups, gap)
    return {metric.name: metric.value for metric in metrics}


def test_error_is_that_of_the_worst_label() -> None:
    assert score_errors(np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 2.5], [2, 4]])).tolist() == [0.5, 1.0]
    assert np.isnan(score_errors(np.array([[1.0, 2]]), np.array([[np.nan, 2]]))[0])


def test_documents_change_places_within_a_query_only() -> None:
    reference, swapped = [[1], [2], [3], [4]], [[2], [1], [3], [4]]
    assert orders(reference, swapped, [0, 0, 1, 1]) == {"document_order": 1}
    assert orders(reference, swapped, [0, 1, 0, 1]) == {"document_order": 0}
    assert orders(reference, swapped, []) == {}


def test_documents_within_the_gap_are_tied() -> None:
    assert orders([[1], [1.05]], [[1.05], [1]], [0, 0]) == {"document_order": 0}
    assert orders([[1], [1.15]], [[1.15], [1]], [0, 0]) == {"document_order": 1}
    assert orders([[1], [1.15]], [[1.1], [1.1]], [0, 0]) == {"document_order": 1}, "a new tie hides an order"


def test_labels_change_places_in_their_row_and_the_choice_is_told() -> None:
    found = orders([[3, 2, 1], [3, 2.95, 1]], [[2, 3, 1], [2.95, 3, 1]], [])
    assert found == {"label_order": 1, "label_flips": 1, "label_tie_flips": 1}
    assert orders([[3, 2, 1]], [[3, 1, 2]], []) == {"label_order": 1, "label_flips": 0, "label_tie_flips": 0}


# --- verdicts --------------------------------------------------------------------------------------


def verdict(actual: Any, reference: Any = None, **context: Any) -> Any:
    wanted = np.array([[0.1], [0.5], [0.9]] if reference is None else reference, np.float32)
    rows = TokenRows(tuple(np.arange(3) for _ in wanted), 0, tuple("abc"[: len(wanted)]), groups=(0,) * len(wanted))
    given = {"precision": "fp32", "override": {}, "seed": 0, **context}
    return judge_scores(
        "scores", {"scores": wanted}, {"scores": np.array(actual, np.float32)}, rows, ComparisonContext(**given)
    )


def test_equal_scores_pass_and_a_wrong_one_fails_with_its_row() -> None:
    assert verdict([[0.1], [0.5], [0.9]]).status == "pass"
    wrong = verdict([[0.1], [0.51], [0.9]])
    assert wrong.status == "fail"
    assert "scores.score_error 0.01, allowed 2.99e-05" in wrong.reason
    assert "worst row 1 ('b')" in wrong.reason
    assert verdict([[0.1], [0.51], [0.9]], precision="fp16").status == "pass"


def test_bound_of_the_case_is_in_the_unit_of_the_scores() -> None:
    assert verdict([[0.1], [0.51], [0.9]], override={"score_error": 0.02, "why": "measured elsewhere"}).status == "pass"


def test_row_that_is_not_finite_fails_by_itself() -> None:
    broken = verdict([[0.1], [np.nan], [0.9]])
    assert broken.status == "fail"
    assert "1 of 3 values are NaN or infinite in 1 of 3 rows" in broken.reason
    assert next(item for item in broken.metrics if item.metric.name == "scores.score_error").passed


def test_scores_that_do_not_tell_rows_apart_prove_nothing() -> None:
    flat = [[0.5], [0.50001], [0.5]]
    assert verdict(flat, flat).status == "inconclusive"
    assert "the same score" in verdict(flat, flat).reason


def test_another_number_of_labels_or_rows_fails() -> None:
    assert "shape [3, 2]" in verdict([[0.1, 0], [0.5, 0], [0.9, 0]]).reason
    assert verdict([[0.1], [0.5]]).status == "fail"


def test_reference_that_is_not_finite_is_inconclusive() -> None:
    assert verdict([[0.1], [0.5], [0.9]], [[0.1], [np.inf], [0.9]]).status == "inconclusive"


@pytest.mark.parametrize("precision", ["fp16+mxfp6", "int8"])
def test_precision_without_measured_noise_is_inconclusive(precision: str) -> None:
    assert verdict([[0.1], [0.5], [0.9]], precision=precision).status == "inconclusive"
