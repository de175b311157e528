# SPDX-License-Identifier: Apache-2.0
"""Adapters on a token embedding and a head that share a weight. The oracle is PEFT's own loader on saved files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import qeff_validate as qv
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.attach_adapters import attach, find_parameter_names
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.protocols import ComparisonContext

SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
TIED = {**SMALL, "tie_word_embeddings": True}
LORA: Mapping[str, Any] = {"r": 4, "init": 0.1}
WHERE: Mapping[str, Mapping[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "copied head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copied embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]},
}
CASES = [pytest.param(name, ensure, id=f"{name}-{ensure}") for name in WHERE for ensure in (False, True)]


def case(name: str, *, ensure: bool) -> qv.Case:
    options = {
        "peft_method": "lora",
        "peft": {**LORA, **WHERE[name], "ensure_weight_tying": ensure},
        "prompts": ["one two three four five six", "alpha beta gamma"],
        "prefill_seq_len": 4,
        "ctx_len": 16,
        "max_new_tokens": 3,
    }
    return qv.Case(
        name="tied", model="peft-causal-lm", source="random:llama", config=TIED, tolerance="table", options=options
    )


@pytest.mark.parametrize(("name", "ensure"), CASES)
def test_the_module_that_is_exported_gives_what_peft_loads(name: str, ensure: bool, tmp_path: Path) -> None:
    (result,) = qv.validate(case(name, ensure=ensure), runtimes=["torch"], store=tmp_path).results
    assert result.status == "pass", result.reason


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's notes on tied weights while it merges
@pytest.mark.parametrize(("name", "ensure"), CASES)
def test_an_adapter_merged_by_peft_gives_what_it_gives_as_inputs(name: str, ensure: bool) -> None:
    model = qv.model(case(name, ensure=ensure))
    inputs = model.inputs(model.tokenize())
    with qv.runtime("torch").open(qv.build(model, "module")) as session:
        verdict = model.relate("merged", session, inputs, ComparisonContext("fp32", {}, 0))  # type: ignore[attr-defined]
    assert verdict.status == "pass", verdict.reason


def test_both_views_of_a_tied_adapter_keep_their_own_names() -> None:
    made = {"peft_method": "lora", **LORA, **WHERE["embedding"], "ensure_weight_tying": True}
    loaded = attach(Random("llama", TIED, 0).causal_lm(), {"a": made})
    live = find_parameter_names(loaded.model)
    assert len(live) == len(set(live.values())) == 6
    assert all(saved.split(".lora_")[0] == name.split(".lora_")[0] for saved, name in live.items())


def test_options_are_not_changed_by_peft() -> None:
    """PEFT moves modules_to_save that are tied from one name to another, in place."""
    made = {"peft_method": "lora", **LORA, **WHERE["copied head"], "ensure_weight_tying": True}
    before = copy.deepcopy(made)
    attach(Random("llama", TIED, 0).causal_lm(), {"a": made})
    assert made == before


@pytest.mark.parametrize("options", [{}, {"adapters": {}}])
def test_mixed_batch_without_adapters_says_what_is_missing(options: Mapping[str, Any]) -> None:
    plain = qv.Case(name="x", model="peft-causal-lm", source="random:llama", options={**options, "mixed_batch": True})
    with pytest.raises(ConfigError, match=r"case 'x': mixed_batch: .* there is none: give adapters .* or peft_method"):
        qv.model(plain)
