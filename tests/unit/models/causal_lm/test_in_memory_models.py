# SPDX-License-Identifier: Apache-2.0
"""A `PeftModel` in the caller's memory as a case's model: its own adapters are judged, and it stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from peft import PeftModel

import qeff_validate as qv
from qeff_validate.models.sources.resolve import InMemory

OPTIONS = {"max_new_tokens": 2, "prefill_seq_len": 4, "ctx_len": 16, "prompts": ["one two three", "four"]}


def case(**more: Any) -> qv.Case:
    return qv.Case(name="mine", model="peft-causal-lm", source="memory", options={**OPTIONS, **more})


@pytest.fixture
def mine() -> PeftModel:
    """Two adapters with different weights; the second is chosen, and the model trains."""
    model, _ = qv.load_model_and_tokenizer({"source": "random:llama", "config": {"num_hidden_layers": 1}})
    adapted = qv.apply_peft(model, {"peft_method": "lora", "r": 4, "init": "random", "seed": 1})
    adapted.add_adapter("second", copy.deepcopy(adapted.peft_config["default"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".second." in name:
                parameter.add_(torch.full_like(parameter, 0.05))
    adapted.set_adapter("second")
    return adapted.train()


def seen(model: PeftModel) -> list[Any]:
    """Everything of a model that somebody could change, tensors bit by bit."""
    state = [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()]
    modules = [
        (name, type(module), module.training, len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    trains = [(id(parameter), parameter.requires_grad, parameter.is_inference()) for parameter in model.parameters()]
    config = model.get_base_model().config
    return [state, modules, trains, model.active_adapters, config.to_json_string(), config._attn_implementation]


def test_both_adapters_agree_on_onnx_runtime_and_the_model_is_unchanged(mine: PeftModel) -> None:
    before = seen(mine)
    report = qv.validate(case(), model=mine, runtimes=["ort"])
    (result,) = report.results
    assert result.status == "pass", result.reason
    measured = {metric.metric.name for metric in result.metrics}
    assert {"adapter.default.delta_cosine", "adapter.second.delta_cosine"} <= measured
    assert seen(mine) == before


@pytest.mark.numeric
def test_reference_is_what_peft_says_with_each_adapter(mine: PeftModel) -> None:
    made = qv.model(case(), given=mine)
    inputs = made.inputs(made.tokenize())
    assert list(inputs.adapters) == ["base", "default", "second"]
    for dtype in ("float64", "float32"):
        found = made.reference(inputs, dtype=dtype)
        first = np.cumsum([0, *found["steps"][:-1]])
        wanted = []
        theirs = copy.deepcopy(mine).eval().to(getattr(torch, dtype))
        for name in inputs.adapters:
            if name != "base":
                theirs.set_adapter(name)
            for ids in inputs.ids:
                with torch.inference_mode():
                    if name == "base":
                        with theirs.disable_adapter():
                            out = theirs(torch.from_numpy(ids)[None])
                    else:
                        out = theirs(torch.from_numpy(ids)[None])
                wanted.append(out.logits[0, -1].numpy())
        close(found["logits"][first], wanted, atol=1.5e-5 if dtype == "float32" else 1e-9)


def test_what_an_adapter_computes_is_part_of_the_fingerprint(mine: PeftModel) -> None:
    key = InMemory(mine, None).body_key()
    other = copy.deepcopy(mine)
    assert InMemory(other, None).body_key() == key
    other.peft_config["second"].lora_alpha *= 2
    assert InMemory(other, None).body_key() != key
    other = copy.deepcopy(mine)
    next(module for module in other.modules() if hasattr(module, "scaling") and hasattr(module, "lora_A")).scaling[
        "second"
    ] = 7.0
    assert InMemory(other, None).body_key() != key


def test_case_with_adapters_of_its_own_or_a_merged_one_is_refused(mine: PeftModel) -> None:
    with pytest.raises(qv.ConfigError, match="brings its own adapters"):
        qv.model(case(peft_method="lora"), given=mine).tokenize()
    mine.merge_adapter()
    with pytest.raises(qv.ConfigError, match="unmerge_adapter"):
        qv.model(case(), given=mine).tokenize()
