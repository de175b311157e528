# SPDX-License-Identifier: Apache-2.0
"""Serving shapes and adapters that share a graph: what is served right passes, and each fault is found and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import check
from qeff_validate.models.causal_lm.next_tokens import NEXT_TOKENS
from qeff_validate.mutation.causal_lm_mutants import CAUSAL_LM_MUTANTS, serving
from qeff_validate.mutation.mutant import session_of
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import runtime
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Array

NAMED = {mutant.name: mutant for mutant in CAUSAL_LM_MUTANTS}
STALE = "not the first 2 texts, which found unused state: what former texts left is seen"
SLOTS = "batch_index must name the slot of the prefill"


def random_adapter(seed: int, **options: Any) -> dict[str, Any]:
    return {"peft_method": "lora", "init": 0.1, "seed": seed, **options}


VIRTUAL = {"peft_method": "prompt_tuning", "peft": {"num_virtual_tokens": 3, "init": 0.5}}
EXPERTS = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
CASES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "slots": (
        "ort", "llama",
        {"full_batch_size": 2, "kv_cache_batch_size": 3, "prefill_seq_len": [2, 4], "next_tokens": True},
    ),
    "recurrent": ("torch", "mamba", {"full_batch_size": 2, "peft": {"r": 4, "target_modules": ["in_proj", "x_proj"]}}),
    "virtual": ("torch", "llama", VIRTUAL),
    "shared": ("torch", "llama", {"adapters": {
        "a": random_adapter(1, r=2, target_modules=["q_proj", "o_proj"]),
        "b": random_adapter(2, r=4, target_modules=["q_proj", "v_proj"]),
    }}),
    "experts": (
        "torch", "mixtral", {"adapters": {"a": random_adapter(1, **EXPERTS), "b": random_adapter(2, **EXPERTS)}},
    ),
}  # fmt: skip
"""By name: the runtime, the model type and options."""

FAULTS = [
    ("slots", "a prompt written into the next slot", SLOTS),
    ("slots", "rows decode in each other's slots", SLOTS),
    ("slots", "stale tail of a former occupant", STALE),
    ("slots", "a row sees its neighbour's slot", "decode steps only"),
    ("recurrent", "recurrent state carried over", STALE),
    ("virtual", "virtual tokens one position late", "its virtual tokens have other positions"),
    ("shared", "padding beyond an adapter's rank not zero", "adapter 'a' changes other things"),
    ("shared", "padding beyond an adapter's rank not zero", "not zero where they are padded"),
    ("shared", "a module served from another adapter", "tensors that are another module's or adapter's"),
    ("experts", "adapters of square weights transposed", "transposed"),
]
"""Case, fault, and words that the reason must have."""


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    return {}


def pipeline(name: str, pipelines: dict[str, Pipeline]) -> Pipeline:
    if name not in pipelines:
        _, model_type, options = CASES[name]
        given = {
            "prompts": [
                "one two three four five six seven eight nine",
                "six",
                "seven eight nine",
                "ten",
                "a b c d e f",
            ],
            "max_new_tokens": 3,
            "prefill_seq_len": 4,
            "ctx_len": 24,
        }
        if "adapters" not in options:
            given |= {"peft_method": "lora", "peft": {"r": 4, "init": 0.1, "target_modules": ["q_proj", "v_proj"]}}
        config = {"hidden_size": 32, "vocab_size": 200}
        config |= {"intermediate_size": 32} if name == "experts" else {}  # as wide as the hidden states
        case = Case(
            name=name,
            model="peft-causal-lm",
            source=f"random:{model_type}",
            config=config,
            options={**given, **options},
        )
        pipelines[name] = Pipeline(case, check(case), Store(), Silent())
    return pipelines[name]


@pytest.mark.parametrize("name", CASES)
def test_right_serving_passes(name: str, pipelines: dict[str, Pipeline]) -> None:
    result = pipeline(name, pipelines).result(runtime(CASES[name][0]))
    assert result.status == "pass", result.reason


def test_slots_on_the_simulated_card_pass(pipelines: dict[str, Pipeline]) -> None:
    result = pipeline("slots", pipelines).result(runtime("sim"))
    assert result.status == "pass", result.reason


@pytest.mark.parametrize(
    "name", ["kept_prefix", "kv_cache", "other_chunks", "other_slots", "poisoned_state", "row_alone"]
)
def test_a_text_is_the_same_whatever_shares_the_card(name: str, pipelines: dict[str, Pipeline]) -> None:
    result = pipeline("slots", pipelines).relation(runtime("ort"), name)
    assert result.status == "pass", result.reason


@pytest.mark.parametrize(("name", "fault", "said"), FAULTS)
def test_fault_is_found_and_named(name: str, fault: str, said: str, pipelines: dict[str, Pipeline]) -> None:
    made = pipeline(name, pipelines)
    result = made.result(FaultyRuntime(serving(NAMED[fault], made.inputs().adapters), CASES[name][0]))
    assert result.status == "fail", result.reason
    assert said in result.reason


def test_next_token_of_another_row_is_found(pipelines: dict[str, Pipeline]) -> None:
    def rolled(_: object, outputs: dict[str, Array]) -> dict[str, Array]:
        return {name: np.roll(array, 1, axis=0) if name == NEXT_TOKENS else array for name, array in outputs.items()}

    result = pipeline("slots", pipelines).result(FaultyRuntime(session_of(out=rolled)))
    assert result.status == "fail", result.reason
    assert "sampler.wrong" in result.reason
    assert "rows fail" not in result.reason, "the logits are right"
