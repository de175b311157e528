# SPDX-License-Identifier: Apache-2.0
"""The selftest: mutants at each level and stage come out as they must, and what is counted is counted right."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upstream.bench import adapters, embedding

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import check, selftest
from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.mutation.mutant import Mutant, mutants, session_of
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.selftest.equivalent_variants import VARIANTS
from qeff_validate.selftest.run import Alarm, CaseUnderTest, Outcome, run_mutants, run_variants
from qeff_validate.selftest.score import Score, markdown


def pipeline(case: Case) -> Pipeline:
    return Pipeline(case, check(case), Store(), Silent())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> CaseUnderTest:
    return CaseUnderTest(embedding(), pipeline, tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CaseUnderTest:
    return CaseUnderTest(adapters(), pipeline, tmp_path_factory.mktemp("graphs"))


def named(kind: str, name: str) -> Mutant:
    return next(mutant for mutant in mutants(kind) if mutant.name == name)


@pytest.mark.parametrize(
    ("name", "stage", "verdict"),
    [
        ("last layer dropped", "fp32", "caught"),
        ("attention scale x 1.001", "fp32", "caught"),
        ("mask ignored in pooling", "fp32", "caught"),
        ("rows rolled", "fp32", "caught"),
        ("scaled by 1.0002", "fp32", "caught"),
        ("pooled by mean", "fp32", "equivalent"),
        ("rotary base x 2", "fp32", "inapplicable"),
        ("token types 1", "fp32", "inapplicable"),
        ("ReLU in one layer", "device", "caught"),
        ("mask ignored in pooling", "device", "caught"),
        ("scaled by 1.02", "device", "caught"),
        ("weights rounded to fp16", "device", "equivalent"),
    ],
)
def test_a_mutant_of_an_embedding_gets_its_verdict(bert: CaseUnderTest, name: str, stage: Any, verdict: str) -> None:
    outcome = bert.outcome(named("embedding", name), stage)
    assert outcome.verdict == verdict, outcome
    if verdict in ("caught", "equivalent"):
        assert (outcome.effect >= 2 * outcome.floor) == (verdict == "caught"), outcome
        assert set(outcome.others) == {"upstream MAD", "torch assert_close", "Polygraphy", "cosine 0.999"}
    assert bert.clean("fp32").status == "pass", "the mutant stayed in the model"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("ReLU in one layer", "caught"),
        ("positions + 1", "equivalent"),
        ("adapters x 1.02", "caught"),
        ("an adapter stays on", "caught"),
        ("one column + 0.05", "caught"),
        ("adapter of the next row", "inapplicable"),
    ],
)
def test_a_mutant_of_a_language_model_gets_its_verdict(llama: CaseUnderTest, name: str, verdict: str) -> None:
    outcome = llama.outcome(named("peft-causal-lm", name), "fp32")
    assert outcome.verdict == verdict, outcome


def test_a_survivor_is_said_to_be_one(bert: CaseUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bounds worth the name, what was caught survives, with the bound that it came nearest to."""
    mutant = named("embedding", "scaled by 1.0002")
    wide = {"rel_l2": 0.01, "cosine": 0.01, "norm_ratio": 0.01, "max_abs_rms": 0.1, "why": "a test"}
    case = embedding(tolerance={"ort": wide})
    outcome = CaseUnderTest(case, pipeline, Path("unused")).outcome(mutant, "fp32")
    assert outcome.verdict == "survived"
    assert "nearest bound: output." in outcome.reason


def test_a_case_that_fails_by_itself_is_refused(tmp_path: Path) -> None:
    strict = embedding(tolerance={"ort": {"rel_l2": 0, "why": "nothing is that exact"}})
    with pytest.raises(ValidateError, match="does not pass without a fault: fail"):
        next(run_mutants(strict, pipeline, tmp_path, lambda _: None, ["fp32"]))


def test_a_case_of_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="selftest needs tolerance: auto"):
        selftest([embedding(tolerance="table")], title="none")


def test_legitimate_variants_pass_and_a_fault_among_them_is_an_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [v for v in VARIANTS if v.name in ("the module with sdpa", "nodes fused", "compiled")]
    broken = some[0].__class__(
        "broken", "fp32", ("embedding",), in_session_of(lambda _, outputs: {"output": -outputs["output"]})
    )
    monkeypatch.setattr("qeff_validate.selftest.run.VARIANTS", [*some, broken])
    alarms = list(run_variants([embedding()], 1, pipeline, tmp_path, lambda _: None, ["fp32", "device"]))
    assert [(alarm.variant, alarm.status, alarm.false) for alarm in alarms] == [
        ("the module with sdpa", "pass", False),
        ("nodes fused", "pass", False),
        ("compiled", "pass", False),
        ("broken", "fail", True),
    ]
    assert alarms[0].others["cosine 0.999"]


def in_session_of(out: Callable[..., Any]) -> Any:
    from qeff_validate.selftest.equivalent_variants import with_session

    return with_session(session_of(None, out), "ort")


def test_there_are_enough_mutants_and_variants() -> None:
    for kind in ("embedding", "peft-causal-lm"):
        assert len(mutants(kind)) >= 40
        assert sum(kind in variant.kinds for variant in VARIANTS) >= 12


# --- counting ----------------------------------------------------------------------------------------


def outcome(verdict: Any, name: str = "m", stage: Any = "fp32", gates: tuple[str, ...] = (), **others: bool) -> Outcome:
    return Outcome("c", stage, name, "rows", "session", verdict, 1e-3, 1e-4, "why", gates, others)


SCORE = Score(
    "t",
    (
        outcome("caught", "a", gates=("rel_l2",), X=True),
        outcome("caught", "b", gates=("rel_l2", "cosine"), X=False),
        outcome("survived", "c", X=False),
        outcome("equivalent", "d", X=True),
        outcome("inapplicable", "e"),
        outcome("caught", "a", "device", gates=("mean_norm",), X=True),
    ),
    (Alarm("c", "v", "fp32", "pass", "", {"X": False}), Alarm("c", "w", "fp32", "fail", "off", {"X": True})),
)


def test_rates_count_neither_equivalent_nor_inapplicable_mutants() -> None:
    assert SCORE.rate("fp32") == pytest.approx(2 / 3)
    assert SCORE.rate("device") == 1
    assert math.isnan(Score("t", (), ()).rate("fp32"))


def test_what_was_not_reached_is_said() -> None:
    assert SCORE.shortfalls() == [
        "float32 (PyTorch, ONNX Runtime): 66.7% of the mutants were caught, the goal is 98%",
        "1 of 2 legitimate runs were called faulty",
    ]
    assert Score("t", SCORE.outcomes[5:], SCORE.alarms[:1]).shortfalls() == []


def test_tables_and_page() -> None:
    tables = {title: rows for title, _, rows in SCORE.tables()}
    assert tables["Mutants"][0][1:] == ("3", "2", "66.7%", "66.7%")  # X finds b and c
    assert tables["Legitimate runs that were called faulty"][0][1:] == ("2", "1", "0", "1")
    assert tables["By class"] == [("rows", "2/3", "1/1")]
    assert ("rel_l2", "2 (1 alone)", "0 (0 alone)") in tables["By metric"]
    page = markdown(SCORE)
    assert "- fp32, c: c: effect 1.00e-03, 10.0 x the floor; why" in page
    assert "- fp32, c: w: fail: off" in page
    assert SCORE.plain()["summary"]["false_alarms"] == 1
