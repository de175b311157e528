# SPDX-License-Identifier: Apache-2.0
"""The default verdict of model kinds with one row per example, and of their own metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest

from qeff_validate.comparison.metric import MetricSpec
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.config.case import Case, Strict
from qeff_validate.models.row_model import ArrayRows, RowModel
from qeff_validate.protocols import ComparisonContext, Measured
from qeff_validate.tensors import Tensors

ROWS = ArrayRows({}, ["a", "b", "c", "d"])
REFERENCE = {"scores": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}


class Scores(RowModel):
    """A kind whose own metric has a bound in float32 alone."""

    metrics: ClassVar = (MetricSpec("shift", "mean of b − a", 1.0, {"fp32": 1e-4}),)

    def own_errors(self, reference: Tensors, actual: Tensors) -> Mapping[str, Floats]:
        return {"shift": np.abs((actual["scores"].astype(np.float64) - reference["scores"]).mean(axis=1))}


def verdict(precision: str, actual: Tensors = REFERENCE, **override: Any) -> Any:
    model = Scores(Case(name="x", source="random:x"), Strict())
    context = ComparisonContext(precision, {**override, **({"why": "test"} if override else {})}, 0)
    return model.judge(REFERENCE, actual, ROWS, context)


def test_own_metric_is_a_gate_where_the_table_has_a_bound() -> None:
    assert verdict("fp32").status == "pass"
    shifted = {"scores": REFERENCE["scores"] + np.float32(2e-4) * np.array([[0], [0], [1], [0]], np.float32)}
    outcome = verdict("fp32", shifted, rel_l2=1e-2, cosine=1e-3, norm_ratio=1e-2, max_abs_rms=1e-2)
    assert (outcome.status, outcome.reason.count("shift")) == ("fail", 1)
    assert "worst row 2 ('c')" in outcome.reason


@pytest.mark.parametrize("precision", ["fp16", "fp16+mxfp6"])
def test_own_metric_without_a_bound_in_the_precision_is_inconclusive(precision: str) -> None:
    vectors = {"rel_l2": 1e-2, "cosine": 1e-3, "norm_ratio": 1e-2, "max_abs_rms": 1e-2, "neighbour_order": 0}
    outcome = verdict(precision, **vectors)
    assert outcome.status == "inconclusive"
    assert "no sound bound for shift" in outcome.reason
    assert verdict(precision, **vectors, shift=1e-3).status == "pass"


def test_own_metric_that_is_not_measured_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "own_errors", RowModel.own_errors)
    assert "no sound bound for shift" in verdict("fp32").reason


def test_optional_part_with_a_missing_method_cannot_be_created() -> None:
    class Partial(Measured):
        def measure(self, exact: Tensors, outputs: Tensors, inputs: Any) -> Mapping[str, float]:
            return {}

    with pytest.raises(TypeError, match=r"abstract methods? .*ensemble.*sensitivity"):
        Partial()  # type: ignore[abstract]
