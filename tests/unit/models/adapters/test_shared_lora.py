# SPDX-License-Identifier: Apache-2.0
"""Adapters of different shape, saved by PEFT, in one graph: each gives what PEFT's own loader gives with it alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from peft import LoraConfig, OFTConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.shared_lora import LoraLayers, shared_tensors
from qeff_validate.models.causal_lm import attach_adapters
from qeff_validate.models.causal_lm.attach_adapters import attach
from qeff_validate.models.framework_calls import quiet_transformers
from qeff_validate.protocols import runtime

SIZES: Mapping[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 100,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilized": {"r": 6, "lora_alpha": 8, "target_modules": ["k_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"q_proj": 2}, "layers_to_transform": [1],
    },
    "head": {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head", "embed_tokens"]},
    "biased": {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj"], "lora_bias": True},
    "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
    "more-tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 5]},
    "tokens-by-layer": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}},
    "whole": {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip

PLAIN = ("small", "rank-stabilized", "patterns")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama, and each adapter as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
        for name, options in ADAPTERS.items():
            write(folder, name, LoraConfig(task_type="CAUSAL_LM", **options))
        write(folder, "dora", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_dora=True))
        write(folder, "oft", OFTConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], oft_block_size=0))
    return folder


def write(folder: Path, name: str, config: Any) -> None:
    with quiet_transformers(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT, on saving embeddings
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder / name)


def base(saved: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved / "base").eval()


def case(saved: Path, names: tuple[str, ...], **options: Any) -> qv.Case:
    adapters = {name: str(saved / name) for name in names}
    return qv.Case(
        name="shared", model="peft-causal-lm", source=f"path:{saved / 'base'}", tolerance="table",
        options={"adapters": adapters, "prompts": ["a", "b c d e f g h i j k"], "max_new_tokens": 4, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [PLAIN[:2], (*PLAIN, "head"), (*PLAIN, "whole"), ("small", "biased", "tokens", "more-tokens")],
    ids="-".join,
)
@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_of_different_shape_agree_with_peft(
    names: tuple[str, ...], mixed: bool, saved: Path, tmp_path: Path
) -> None:
    if mixed and names != PLAIN[:2]:
        names = (*PLAIN, "whole") if "whole" in names else ("small", "biased")  # not embeddings or tokens by row
    runner = Runner(store=tmp_path / "store", model=base(saved))
    result = runner.pipeline(case(saved, names, mixed_batch=mixed)).result(runtime("torch"))
    assert result.status == "pass", result.reason


def test_adapter_of_the_head_alone_is_exported_and_served(saved: Path, tmp_path: Path) -> None:
    report = qv.validate(case(saved, ("head",)), runtimes=["ort"], store=tmp_path / "store", model=base(saved))
    assert report.passed, report.results[0].reason


@pytest.mark.parametrize("fault", ["rank that is padded is not zero", "module of another adapter"])
def test_faults_of_sharing_are_found(fault: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(tensors: Any, layers: Any, neutral: Any, tokens: Any = ()) -> Any:
        shared = shared_tensors(tensors, layers, neutral, tokens)
        for name, array in shared.items():
            if fault.startswith("rank") and ".lora_" in name:
                shared[name] = np.where(array == 0, np.float32(0.2), array)
            elif "layers.0.self_attn.k_proj.lora_" in name:
                shared[name] = first.setdefault(name, array if array.any() else array + np.float32(0.2))
        return shared

    first: dict[str, Any] = {}
    monkeypatch.setattr(attach_adapters, "shared_tensors", faulty)
    runner = Runner(store=tmp_path / "store", model=base(saved))
    result = runner.pipeline(case(saved, PLAIN[:2])).result(runtime("torch"))
    assert result.status == "fail"
    assert "'small'" in result.reason


@pytest.mark.numeric
def test_product_of_padded_tensors_is_that_of_the_adapter() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (6, 2)))
    names = [f"base_model.model.q.lora_{factor}.weight" for factor in "AB"]
    neutral = {names[0]: np.zeros((5, 8), np.float32), names[1]: np.zeros((6, 5), np.float32)}
    other = {name.replace(".q.", ".k."): np.ones_like(array) for name, array in neutral.items()}
    layers = LoraLayers({"q": 2}, {"q": 1.5})
    shared = shared_tensors(dict(zip(names, (a, b), strict=True)), layers, {**neutral, **other})
    close(shared[names[1]] @ shared[names[0]], 1.5 * (b @ a), rtol=1e-5, atol=1e-6)
    assert not shared[names[0]][2:].any()
    assert not shared[names[1]][:, 2:].any()
    assert not any(shared[name].any() for name in other), "a module that the adapter does not adapt has zeros"


@pytest.mark.parametrize("name", ["dora", "oft", "tokens-by-layer"])
def test_what_cannot_share_proposes_groups(name: str, saved: Path) -> None:
    model = base(saved)
    named = {each: str(saved / each) for each in ("small", name, "rank-stabilized")}
    with pytest.raises(ConfigError, match=rf"'{name}' has .* a case: small, rank-stabilized; {name}"):
        attach(model, named)


def test_module_that_one_adapter_replaces_and_another_adapts_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"'whole' replaces lm_head .* on which 'head' has LoRA"):
        attach(base(saved), {name: str(saved / name) for name in ("head", "whole")})


def test_base_layer_of_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "other"
    folder.mkdir()
    tensors = load_file(saved / "head" / "adapter_model.safetensors")
    layers = [name for name in tensors if ".base_layer." in name]
    assert layers, "PEFT saves the base layers of embeddings and heads"
    save_file({**tensors, layers[0]: tensors[layers[0]] + 1}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((saved / "head" / "adapter_config.json").read_text())
    model = base(saved)
    with pytest.raises(ConfigError, match="is not the weight of this base: it was trained on another one"):
        attach(model, {"head": str(folder)})
