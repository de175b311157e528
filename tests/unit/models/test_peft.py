# SPDX-License-Identifier: Apache-2.0
"""Adapters on causal LMs. The oracle is PEFT: its own saving and loading, its own configs."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapter import adapter_fingerprint, read_adapter
from qeff_validate.models.made import Random
from qeff_validate.models.peft import (
    adapter_tensors,
    apply_peft,
    generate_peft_config,
    load_adapter_tensors,
)
from qeff_validate.models.peft_config import ALIASES, METHODS, REFUSED

QV = ["q_proj", "v_proj"]
IDS = torch.tensor([[5, 9, 200, 44, 120, 12, 81, 3, 99, 10]])

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "adamss": {"r": 4, "num_subspaces": 2},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 32},
    "ia3": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
    "oft": {"oft_block_size": 4},
    "randlora": {"r": 8},
    "road": {"group_size": 16},
    "trainable_tokens": {"target_modules": ["embed_tokens"], "token_indices": [5, 9]},
    "vblora": {"num_vectors": 16, "vector_length": 16},
    "waveft": {"n_frequency": 32},
    **{method: {"r": 4} for method in (
        "deft", "delora", "dora", "glora", "gralora", "hira", "hra", "lily", "loha", "lokr", "lora", "miss", "peanut",
        "psoft", "pvera", "rslora", "shira", "vera")},
}  # fmt: skip
"""What a method needs to fit a model of width 32; q_proj and v_proj are the targets where nothing is said."""


def options(method: str) -> dict[str, Any]:
    return {"peft_method": method, "target_modules": QV, **OPTIONS.get(method, {})}


@pytest.fixture(scope="module")
def base() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 256, "num_hidden_layers": 2}
    return Random("llama", small, 0).causal_lm()


@pytest.fixture
def fresh(base: Any) -> Callable[[], Any]:
    return lambda: copy.deepcopy(base)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(IDS).logits


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def lora(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with an effect, saved by PEFT."""
    model = apply_peft(copy.deepcopy(base), {**options("lora"), "init": "random", "seed": 3})
    return saved(model, tmp_path_factory.mktemp("adapter") / "lora")


# --- every method ----------------------------------------------------------------------------------


def test_every_method_of_peft_is_supported_or_refused_with_a_reason() -> None:
    names = {kind.value.lower() for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {*METHODS, *REFUSED} == names
    assert {"lora", "ia3", "adalora", "loha", "lokr", "vera", "oft", "boft", "randlora", "hra"} <= set(METHODS)
    assert all(REFUSED.values())


@pytest.mark.parametrize("method", sorted([*METHODS, *ALIASES]))
def test_adapter_has_an_effect_trains_alone_leaves_the_base_and_reloads(
    method: str, base: Any, fresh: Callable[[], Any], tmp_path: Path
) -> None:
    """Oracles: the untouched base, and PEFT's own save and load."""
    model = fresh()
    weights = dict(model.named_parameters())
    adapted = apply_peft(model, {**options(method), "init": "random", "seed": 1})
    assert isinstance(adapted, PeftModel)
    assert not any(module.training for module in adapted.modules())
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.named_parameters())
    trained = {id(tensor) for tensor in adapted.parameters() if tensor.requires_grad}
    assert trained
    assert not trained & {id(tensor) for tensor in weights.values()}
    plain, got = logits(base), logits(adapted)
    assert 0.005 < ((got - plain).norm() / plain.norm()).item() < 2
    folder = saved(adapted, tmp_path / "adapter")
    again = apply_peft(fresh(), {"adapter": folder})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(fresh(), folder)
    assert torch.equal(logits(again), logits(theirs))
    torch.testing.assert_close(logits(again), got, rtol=0, atol=2e-5)
    names = {name for name, tensor in again.named_parameters() if tensor.requires_grad}
    assert names == {name for name, tensor in adapted.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("method", sorted([*METHODS, *ALIASES]))
def test_config_survives_peft_writing_and_reading_it(method: str, tmp_path: Path) -> None:
    config = generate_peft_config(options(method))
    config.save_pretrained(tmp_path)
    theirs = PeftConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(config)
    assert theirs.to_dict() == config.to_dict() == generate_peft_config(config.to_dict()).to_dict()
    assert config.task_type == "CAUSAL_LM"
    assert generate_peft_config(config) is not config
