# SPDX-License-Identifier: Apache-2.0
"""Floors and faults are measured on some of many rows, and hidden states are shared by poolings of one body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import close

import qeff_validate as qv
from qeff_validate.builders.store import Store
from qeff_validate.comparison.decisive_rows import MOST
from qeff_validate.config.case import Precision
from qeff_validate.engine import Runner
from qeff_validate.models.causal_lm.prompts import LONG
from qeff_validate.pipeline.case_pipeline import Pipeline

WORDS = LONG.split()
MANY = [" ".join([*WORDS[at % 20 : at % 20 + 1 + at % 9], str(at)]) for at in range(4 * MOST)]
FP32 = Precision(compute="fp32")


def case(kind: str = "bert", texts: Any = None, name: str = "sampled", **options: Any) -> qv.Case:
    inputs = {} if texts is None else {"inputs": {"texts": texts}}
    options = {"pooling": "mean", "seq_len": [32], "batch_size": 4, **options}
    return qv.Case(name=name, source=f"random:{kind}", options=options, exporter="torchscript", **inputs)


def pipeline(one: qv.Case, store: Path) -> Pipeline:
    return Runner(store=store).pipeline(one)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def test_many_texts_are_judged_by_bounds_from_some_of_them(store: Path) -> None:
    (result,) = qv.validate(case(texts=MANY), ["ort"], store=store).results
    assert result.status == "pass", result.reason
    assert (result.compared, result.planned) == (len(MANY) + 1, len(MANY) + 1), "every row is compared"
    gate = next(item for item in result.metrics if item.metric.name == "output.rel_l2")
    assert gate.bound is not None
    assert gate.bound.source == "floor"
    assert f"with {len(MANY) - MOST} texts estimated from the others" in gate.bound.why


@pytest.mark.numeric
def test_the_limit_from_some_rows_is_near_that_of_all(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out rows: those that were not measured; the factor of a bound in float32 is 3."""
    some = pipeline(case(texts=MANY), store).floor(FP32)
    monkeypatch.setattr("qeff_validate.comparison.decisive_rows.MOST", 10**6)
    monkeypatch.setattr("qeff_validate.pipeline.case_artifacts.MOST", 10**6)
    monkeypatch.setattr("qeff_validate.comparison.decisive_rows.decisive_rows.__defaults__", (10**6,))
    every = pipeline(case(texts=MANY), store).floor(FP32)
    assert some is not None
    assert every is not None
    assert some.rows is not None
    assert (every.rows, every.left_out) == (None, 0)
    for name, errors in every.errors.items():
        assert 1 / 3 < some.errors[name].mean() / errors.mean() < 3, name
    close(some.center["output"], every.center["output"][some.rows], rtol=1e-4, atol=1e-6)


def test_a_device_is_compared_with_the_mean_on_the_measured_rows(store: Path) -> None:
    (result,) = qv.validate(case(texts=MANY), ["sim"], store=store).results
    assert result.status == "pass", result.reason
    systematic = next(item for item in result.metrics if item.metric.name == "output.mean_signed")
    assert systematic.metric.worst["rows"] == MOST, "the row without a token takes no part"


@pytest.mark.numeric
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_a_subset_has_the_vectors_of_its_texts(store: Path, pooling: str) -> None:
    made = pipeline(case(texts=MANY[:7], pooling=pooling), store)
    model: Any = made.model()
    inputs, reference, rows = model.subset(made.inputs(), made.reference(), [5, 1])
    assert inputs.texts == (MANY[5], MANY[1])
    assert np.array_equal(reference["output"], made.reference()["output"][rows])
    close(model.reference(inputs, dtype="float32")["output"], reference["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.numeric
def test_a_subset_of_prompts_has_the_logits_of_their_continuations_with_each_adapter(tmp_path: Path) -> None:
    adapters = {name: {"peft_method": "lora", "r": 2, "init": 0.1, "seed": seed} for seed, name in enumerate("ab")}
    options = {"adapters": adapters, "prefill_seq_len": 4, "ctx_len": 24, "max_new_tokens": 3}
    prompts = [" ".join(WORDS[at : at + 2 + at % 3]) for at in range(5)]
    one = qv.Case(name="lm", model="peft-causal-lm", source="random:llama", options={**options, "prompts": prompts})
    made = pipeline(one, tmp_path)
    model: Any = made.model()
    inputs, reference, rows = model.subset(made.inputs(), made.reference(), [3, 0])
    assert inputs.texts == (prompts[3], prompts[0])
    again = model.reference(inputs, dtype="float32")
    assert np.array_equal(again["tokens"], reference["tokens"])
    assert np.array_equal(again["steps"], reference["steps"])
    close(again["logits"], reference["logits"], rtol=1e-4, atol=1e-5)
    assert np.array_equal(made.reference()["logits"][rows], reference["logits"])
    assert len(model.sensitivity(made.inputs(), made.reference())) == len(prompts)


def test_other_poolings_of_a_body_run_it_no_second_time(tmp_path: Path) -> None:
    def stored() -> set[Path]:
        return {kept.path for kept in Store(tmp_path / "shared").entries() if kept.kind == "states"}

    (first,) = qv.validate(case(texts=MANY[:6]), ["torch"], store=tmp_path / "shared").results
    before = stored()
    assert len(before) == 4, "reference, float64, ensemble and faults"
    other = case(texts=MANY[:6], name="other", pooling="max")
    (second,) = qv.validate(other, ["torch"], store=tmp_path / "shared").results
    assert stored() == before
    (alone,) = qv.validate(other, ["torch"], store=tmp_path / "alone").results
    assert (first.status, second.status, second.power) == ("pass", "pass", alone.power)
    values = [[(item.metric, item.bound) for item in result.metrics] for result in (second, alone)]
    assert values[0] == values[1], "what was kept says the same as what is run"


def test_states_of_another_body_or_of_other_tokens_are_not_shared(tmp_path: Path) -> None:
    sizes = []
    for one in (case(texts=MANY[:6]), case(texts=MANY[1:7]), case("roberta", texts=MANY[:6])):
        made = pipeline(one, tmp_path)
        made.exact()
        sizes.append(sum(kept.kind == "states" for kept in Store(tmp_path).entries()))
    assert sizes == [2, 4, 6]


def test_a_long_corpus_is_pooled_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pipeline(case(texts=MANY[:6]), tmp_path / "kept").reference()
    monkeypatch.setattr("qeff_validate.models.embedding.model.SHARED_TOKENS", 3)
    streaming = pipeline(case(texts=MANY[:6]), tmp_path / "streaming")
    assert np.array_equal(streaming.reference()["output"], kept["output"])
    assert not [entry for entry in Store(tmp_path / "streaming").entries() if entry.kind == "states"]
    model: Any = streaming.model()
    norms = np.linalg.norm(kept["output"].astype(float), axis=1)
    assert model.sensitivity(streaming.inputs(), kept) == pytest.approx(list(-norms))
