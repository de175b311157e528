# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one batch: each row is served by its own, and a session that mixes them up fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import check
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.batched_lora import RowLinear
from qeff_validate.models.causal_lm.relations import RELATIONS
from qeff_validate.mutation.causal_lm_mutants import CAUSAL_LM_MUTANTS, serving
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Session, runtime
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Array, Tensors


def case(**options: Any) -> Case:
    given = {
        "peft_method": "lora",
        "peft": {"r": 4, "init": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "prompts": ["one two three four five", "six", "seven eight nine"],
        "max_new_tokens": 3,
        "prefill_seq_len": 4,
        "ctx_len": 16,
        "mixed_batch": True,
    }
    return Case(name="mixed", model="peft-causal-lm", source="random:llama", options={**given, **options})


def pipeline_of(made: Case) -> Pipeline:
    return Pipeline(made, check(made), Store(), Silent())


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return pipeline_of(case())


class Ids:
    """A session that changes which adapters the rows have."""

    def __init__(self, session: Session, change: Callable[[Array], Array]) -> None:
        self._session, self._change = session, change
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        ids = self._change(feeds["adapter_ids"]).astype(np.int64)
        return self._session.run({**feeds, "adapter_ids": ids}, fetch=fetch)

    def reset(self) -> None:
        self._session.reset()


@pytest.mark.parametrize("name", ["torch", "ort", "sim"])
def test_rows_with_different_adapters_agree_with_peft(name: str, pipeline: Pipeline) -> None:
    result = pipeline.result(runtime(name))
    assert result.status == "pass", result.reason
    assert result.compared == 3 * 3 * 3 + 2 * 3 * 3  # adapters x prompts x tokens, and the second visits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            lambda ids: np.full_like(ids, ids[0]),
            "some prompts with 'base' give the outputs of 'b'",
            id="the first row's",
        ),
        pytest.param(np.zeros_like, "adapter 'a' behaves as base", id="none"),
        pytest.param(lambda ids: (ids + 1) % 3, "base gives the outputs of adapter 'a'", id="the next one"),
        pytest.param(lambda ids: np.where(ids == 2, 1, ids), "adapter 'b' gives the outputs of 'a'", id="too few"),
    ],
)
def test_adapters_of_other_rows_are_noticed(change: Callable[[Array], Array], said: str, pipeline: Pipeline) -> None:
    result = pipeline.result(FaultyRuntime(lambda session: Ids(session, change)))
    assert result.status == "fail"
    assert said in result.reason


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter of the first prompt for all", "adapter 'a' behaves as base"),
        ("adapter of the next row", "some prompts with 'base' give the outputs of 'a' or 'b'"),
        ("first two adapters swapped", "adapter 'a' gives the outputs of 'b'"),
        ("NaN with one adapter at decode", "with a only"),
        ("one bit at a second visit", "the second visit to "),
    ],
)
def test_mutants_of_mixed_batches_are_noticed(name: str, said: str, pipeline: Pipeline) -> None:
    (mutant,) = [mutant for mutant in CAUSAL_LM_MUTANTS if mutant.name == name]
    result = pipeline.result(FaultyRuntime(serving(mutant, pipeline.inputs().adapters)))
    assert result.status == "fail"
    assert said in result.reason


def test_all_relations_hold(pipeline: Pipeline) -> None:
    found = {name: pipeline.relation(runtime("ort"), name) for name in RELATIONS}
    assert {name: result.status for name, result in found.items()} == dict.fromkeys(RELATIONS, "pass"), [
        result.reason for result in found.values()
    ]


def test_a_row_that_takes_its_neighbours_adapter_breaks_mixed_rows(pipeline: Pipeline) -> None:
    result = pipeline.relation(
        FaultyRuntime(lambda session: Ids(session, lambda ids: np.full_like(ids, ids[-1]))), "mixed_rows"
    )
    assert result.status == "fail"
    assert "worst row" in result.reason


@pytest.mark.numeric
def test_each_row_is_multiplied_by_its_own_weight() -> None:
    drawn = np.random.default_rng(0)
    x, weights = drawn.normal(size=(3, 2, 5)).astype(np.float32), drawn.normal(size=(3, 4, 5)).astype(np.float32)
    layer = RowLinear(torch.nn.Linear(5, 4, bias=False))
    found = torch.func.functional_call(layer, {"weight": torch.from_numpy(weights)}, (torch.from_numpy(x),))
    close(found, np.einsum("bsi,boi->bso", x, weights), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"given \[6, 5\], not \[batch, seq_len, features\]"):
        layer(torch.zeros(6, 5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_method": "ia3", "peft": {}}, "mixed_batch serves lora and rslora, and the adapters are ia3"),
        ({"peft_method": "dora"}, "is DoRA or another variant"),
        ({"peft": {"r": 4, "target_modules": ["embed_tokens"]}}, "is no plain linear layer"),
        ({"batch_size": 1}, "batch_size must be 2 or more"),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_the_reason(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pipeline_of(case(**options)).model().module()
