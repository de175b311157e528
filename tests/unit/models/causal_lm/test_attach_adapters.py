# SPDX-License-Identifier: Apache-2.0
"""The model without an adapter on a graph with one, integers among an adapter's tensors, and widened references."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.config import generate_peft_config
from qeff_validate.models.causal_lm import attach_adapters
from qeff_validate.models.causal_lm.attach_adapters import attach, set_adapter_tensors
from qeff_validate.models.causal_lm.reference import continuations
from qeff_validate.models.causal_lm.wrapper import decoder_examples
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.protocols import Graph
from qeff_validate.tensors import TensorSpec

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 40, "intermediate_size": 32}
IDS = torch.tensor([[3, 17, 5, 29]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def drawn(method: str, **options: Any) -> dict[str, Any]:
    return {"a": {"peft_method": method, "init": 0.3, "target_modules": ["q_proj", "v_proj"], **options}}


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"init_lora_weights": False}),
        ("lora", {"init_lora_weights": "orthogonal"}),
        ("adalora", {"total_step": 10}),
        ("c3a", {"block_size": 8}),
        ("unilora", {}),
        ("miss", {"init_weights": "bat", "r": 8}),
        ("miss", {"init_weights": "mini", "r": 8, "mini_r": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_base_on_the_graph_of_an_adapter_is_the_model_without_one(method: str, options: dict[str, Any]) -> None:
    source = Random("llama", SMALL, 0)
    plain = logits(source.causal_lm())
    loaded = attach(source.causal_lm(), drawn(method, **options))
    close(logits(loaded.model), plain, rtol=1e-5, atol=1e-5)
    set_adapter_tensors(loaded.model, loaded.adapters["a"], loaded.parameter_names)
    assert (logits(loaded.model) - plain).norm() > 0.01 * plain.norm()


def test_start_that_a_method_has_a_name_for_is_kept() -> None:
    config = generate_peft_config({"peft_method": "adamss", "init_weights": None})
    assert attach_adapters.with_default_init(config).init_weights == "orthogonal"


def test_method_that_can_not_be_without_effect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attach_adapters, "_probe_logits", lambda model: torch.full((1,), float(hasattr(model, "peft_config")))
    )
    with pytest.raises(ConfigError, match="neither a fresh adapter of LoraConfig nor one of zeros"):
        attach(Random("llama", SMALL, 0).causal_lm(), drawn("lora"))


def test_integers_of_an_adapter_are_no_tokens() -> None:
    shapes = {"input_ids": ("batch_size", "seq_len"), "position_ids": ("batch_size", "seq_len"), "a.indices": (2, 40)}
    inputs = tuple(TensorSpec(name, "int64", shape) for name, shape in shapes.items())
    given = {"a.indices": np.arange(80).reshape(2, 40)}
    examples = decoder_examples(Graph(inputs=inputs, outputs=(), buckets=()), given)
    assert examples["input_ids"].shape == (3, 5)
    np.testing.assert_array_equal(examples["a.indices"], given["a.indices"])


@pytest.mark.numeric
def test_adapters_go_on_a_model_that_has_computed_in_float64() -> None:
    named = {
        name: {"peft_method": "dora", "r": 2, "init": 0.1, "seed": seed, "target_modules": ["c_attn"]}
        for seed, name in enumerate("ab")
    }
    source = Random("gpt2", {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 40}, 0)
    adapters = attach(source.causal_lm(), named).adapters
    inputs = SimpleNamespace(ids=(IDS[0].numpy(),), labels=("a prompt",), eos=frozenset(), adapters=adapters)
    model = source.causal_lm()
    exact = continuations(model, named, inputs, 2, "float64")
    rounded = continuations(model, named, inputs, 2, "float32")
    assert exact["logits"].dtype == np.float64
    np.testing.assert_array_equal(exact["tokens"], rounded["tokens"])
    close(exact["logits"], rounded["logits"], atol=1e-4)
    assert np.abs(exact["logits"] - rounded["logits"]).max() > 0


def test_option_without_repeatable_runs_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="option coft is not supported: constrained OFT projects its weights anew"):
        attach(Random("llama", SMALL, 0).causal_lm(), drawn("oft", oft_block_size=8, coft=True))


def test_patterns_reach_the_parameters_of_experts() -> None:
    model = Random("qwen3_moe", {"num_hidden_layers": 1, "vocab_size": 40}, 0).causal_lm()
    options = {"r": 2, "target_parameters": ["mlp.experts.down_proj"], "rank_pattern": {r".*\.down_proj": 4}}
    shapes = [array.shape for array in attach(model, drawn("lora", **options)).adapters["a"].values()]
    experts = model.config.num_experts
    assert any(4 * experts in shape for shape in shapes)


def test_adapters_that_no_module_takes_together_are_told_to_part() -> None:
    config = {**SMALL, "tie_word_embeddings": True}
    tokens = {"peft_method": "lora", "target_modules": ["q_proj"], "trainable_token_indices": [3]}
    table = {"peft_method": "lora", "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    with pytest.raises(ConfigError, match="'a', 'b' fit the base one by one, and cannot share a graph"):
        attach(Random("llama", config, 0).causal_lm(), {"a": tokens, "b": table})


def test_adapter_on_a_module_that_peft_cannot_run_says_to_leave_it_out() -> None:
    model = Random("llama4_text", {"num_hidden_layers": 2}, 0).causal_lm()
    everywhere = {"peft_method": "lora", "r": 2, "target_modules": "all-linear"}
    with pytest.raises(
        ConfigError, match=r"PEFT does not run Llama4ForCausalLM .* such as routers, out of target_modules"
    ):
        attach(model, {"a": everywhere})
