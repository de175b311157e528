# SPDX-License-Identifier: Apache-2.0
"""An explanation never changes a verdict, and costs a passing case nothing."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.errors import BuildError
from qeff_validate.explain import explain as module
from qeff_validate.explain.attribution import Attribution
from qeff_validate.explain.context import Clock, ExplainContext, Subset, TimeIsUpError
from qeff_validate.pipeline.explanation import with_explanation
from qeff_validate.pipeline.stages import Silent, Stages
from qeff_validate.protocols import OriginalRun, Settings, runtime
from qeff_validate.report.explanation import Explanation, StageShare
from qeff_validate.report.result import Result

METRICS = (GateResult(Metric("output.rel_l2", 1.0), None),)


class Pipeline:
    """All that is asked of a pipeline here."""

    stages = Stages("small", Silent())


def add(result: Result, mode: str = "auto") -> Result:
    pipeline: Any = Pipeline()
    return with_explanation(pipeline, runtime("ort"), result, Settings(), mode)


def test_garbage_is_not_collected_while_the_original_model_is_imported_and_loaded() -> None:
    collecting: list[bool] = []

    class Model:
        def original_run(self, *_: Any) -> OriginalRun:
            collecting.append(gc.isenabled())
            return OriginalRun(None, {}, np.ones((1, 1), bool), dict, {})

    case: Any = SimpleNamespace(model=Model, case=SimpleNamespace(artifacts=SimpleNamespace(outputs={})))
    subset = Subset(None, None, None)
    result = Result("small", "ort", "fail")
    ExplainContext(case, runtime("ort"), result, Settings(), Clock(1, 0)).original_run(subset, {}, 0)
    assert collecting == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("exc", [BuildError("no exporter"), ZeroDivisionError("bug"), MemoryError()])
def test_exception_in_an_explanation_is_a_finding_and_leaves_the_verdict(
    exc: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Explanation:
        raise exc

    monkeypatch.setattr(module, "explain", fail)
    before = Result("small", "ort", "fail", "wrong", metrics=METRICS, findings=("told",))
    after = add(before)
    assert (after.status, after.reason, after.metrics, after.explanation) == ("fail", "wrong", METRICS, None)
    assert after.findings[0] == "told"
    assert after.findings[1].startswith("not explained: ")


@pytest.mark.parametrize(
    ("result", "mode"),
    [
        (Result("small", "ort", "pass", metrics=METRICS), "full"),
        (Result("small", "ort", "inconclusive", metrics=METRICS), "auto"),
        (Result("small", "ort", "fail", metrics=METRICS, expected="known"), "auto"),
        (Result("small", "ort", "fail"), "auto"),
        (Result("small", "ort", "fail", metrics=METRICS), "off"),
    ],
)
def test_what_is_not_to_be_explained_is_left_alone(result: Result, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "explain", None)  # calling it would be a finding
    assert add(result, mode) is result


def test_failing_result_gets_its_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def explain(*_: Any, limit_s: float, **_more: Any) -> Explanation:
        limits.append(limit_s)
        return Explanation("here")

    monkeypatch.setattr(module, "explain", explain)
    result = add(Result("small", "ort", "fail", metrics=METRICS))
    assert result.explanation == Explanation("here")
    assert limits == [60.0]


@pytest.mark.parametrize("known", [True, False])
def test_what_is_known_when_the_time_is_up_is_kept(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(work: Any) -> None:
        if known:
            work.attribution = Attribution((StageShare("export", 1.0, 0.5),), "export")
        raise TimeIsUpError("the time limit of 60 s has passed")

    monkeypatch.setattr(module.Explainer, "run", run)
    result = add(Result("small", "ort", "fail", metrics=METRICS))
    if known:
        assert result.explanation is not None
        assert result.explanation.stage == "export"
        assert result.explanation.summary.endswith("; the time limit of 60 s has passed")
    else:
        assert result.findings == ("not explained: the time limit of 60 s has passed",)
