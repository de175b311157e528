# SPDX-License-Identifier: Apache-2.0
"""Adapters that do not fit: what differs is told by its kind. The adapters are PEFT's own, saved and then damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.names import key_differences
from qeff_validate.models.causal_lm.attach_adapters import attach
from qeff_validate.models.sources.synthetic import Random

SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
Tensors = dict[str, torch.Tensor]


def llama(**more: Any) -> Any:
    return Random("llama", {**SMALL, **more}, 0).causal_lm()


def save(folder: Path, model: Any, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's notes on tied weights, and on a base without a config file
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("adapter"), llama(), target_modules=["q_proj", "v_proj"])


def damaged(folder: Path, to: Path, change: Callable[[Tensors], Tensors]) -> str:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    file = to / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return str(to)


def renamed(rule: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rule(name): tensor for name, tensor in tensors.items()}


def refusal(folder: str, model: Any | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        attach(model or llama(), {"a": folder})
    return str(caught.value)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda name: name.removeprefix("base_model.model."), "lacks 'base_model.model.'"),
        (lambda name: name.removeprefix("base_model."), "lacks 'base_model.'"),
        (lambda name: f"base_model.model.{name}", "has 'base_model.model.' too much"),
        (lambda name: f"module.{name}", "has 'module.' too much"),
        (lambda name: name.replace("model.layers", "_orig_mod.model.layers"), "has '_orig_mod.' too much"),
        (lambda name: name.replace("model.layers", "layers"), "lacks 'model.'"),
        (lambda name: name.replace(".weight", ".default.weight"), "has 'default.' too much"),
    ],
)
def test_a_prefix_is_told_with_both_names(rule: Callable[[str], str], words: str, saved: Path, tmp_path: Path) -> None:
    text = refusal(damaged(saved, tmp_path, renamed(rule)))
    first = next(iter(load_file(saved / "adapter_model.safetensors")))
    assert "none of the 8 tensors" in text
    assert f"prefix: the adapter {words} in 8 names" in text
    assert repr(first) in text
    assert repr(rule(first)) in text
    assert not re.search("missing:|extra:|shape:|modules:", text)


@pytest.mark.parametrize("size", [10**12, 100, 3])
def test_file_of_another_size_than_its_header_says_is_not_read(size: int, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "a")
    os.truncate(tmp_path / "a" / "adapter_model.safetensors", size)
    assert re.search(r"adapter_model\.safetensors( has|:)", refusal(str(tmp_path / "a")))


def test_missing_and_extra_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        name, *_ = sorted(tensors)
        tensors[name.replace("lora_A", "lora_C")] = tensors.pop(name)
        return tensors

    text = refusal(damaged(saved, tmp_path, change))
    assert "7 of the 8 tensors" in text
    assert "extra: 1 tensors" in text
    assert re.search(r"lora_C.weight' \(nearest: '\S+q_proj.lora_A.weight'\)", text)
    assert "missing: 1 tensors" in text


def test_another_rank_is_told_by_both_ranks(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 16}))
    text = refusal(str(tmp_path))
    assert "shape: 8 tensors have rank 4, the config gives rank 16" in text
    assert "the adapter has [4, 32], the config on this model gives [16, 32]" in text


def test_another_width_is_another_base(saved: Path) -> None:
    text = refusal(str(saved), llama(hidden_size=64))
    assert "other sizes, so another base" in text
    assert "the adapter has [4, 32], the config on this model gives [4, 64]" in text


def test_grown_vocabulary_is_told_with_its_remedy(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder = save(tmp_path / "grown", llama(vocab_size=65), **options)
    with pytest.raises(ConfigError, match=r"trained with 65 tokens, the model has 64 .*resize_token_embeddings\(65\)"):
        attach(llama(), {"a": str(folder)})


def test_a_layer_that_the_base_does_not_have(saved: Path) -> None:
    text = refusal(str(saved), llama(num_hidden_layers=1))
    assert "layers: the adapter reaches layer 1, and this model's last layer with an adapter is 0, so 4 tensors" in text
    assert "4 of the 4 tensors" in text


def test_names_of_another_base(saved: Path, tmp_path: Path) -> None:
    text = refusal(
        damaged(saved, tmp_path, renamed(lambda name: re.sub("q_proj", "c_attn", name).replace("v_proj", "c_fc")))
    )
    assert "none of the 8 tensors" in text
    assert "tensors for 'c_attn'" in text
    assert "q_proj, v_proj: other target_modules, or an adapter of another base" in text


def test_what_fits_has_no_difference() -> None:
    shapes = {"base_model.model.q_proj.lora_A.weight": (4, 8)}
    assert key_differences(shapes, shapes) is None


def test_copies_of_a_tied_tensor_that_differ_are_refused(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    folder = save(tmp_path / "a", llama(**tied), target_modules=["embed_tokens"], ensure_weight_tying=True)

    def change(tensors: Tensors) -> Tensors:
        own = {name: tensor.clone() for name, tensor in tensors.items() if "lora" in name}
        next(tensor for name, tensor in own.items() if "lm_head.lora_A" in name)[0, 0] += 1
        return own

    attach(llama(**tied), {"a": damaged(folder, tmp_path / "c", lambda t: {n: v for n, v in t.items() if "lora" in n})})
    text = refusal(damaged(folder, tmp_path / "b", change), llama(**tied))
    assert "are one tied tensor (ensure_weight_tying)" in text


PATTERNS: Mapping[str, Mapping[str, Any]] = {
    "target_modules": {"target_modules": r"((\w*\.*)*)*q_projX"},
    "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": r"(.*)*(.*)*(.*)*X!"},
    "rank_pattern": {"target_modules": ["q_proj"], "rank_pattern": {r"((\w|\.)*)*X!": 8}},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": r"((\w|\.)*)*X!"},
}


@pytest.mark.parametrize("option", PATTERNS)
def test_patterns_that_never_end_are_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qeff_validate.models.adapters.module_patterns.SECONDS", 1)
    made = {"peft_method": "lora", "r": 4, **PATTERNS[option]}
    with pytest.raises(ConfigError, match=f"{option}: matching .* more than 1 s: repetitions inside of repetitions"):
        attach(llama(), {"a": made})


@pytest.mark.parametrize("option", ["target_modules", "rank_pattern"])
def test_what_is_no_pattern_is_told(option: str) -> None:
    value: Any = "(q_proj" if option == "target_modules" else {"(q_proj": 8}
    made = {"peft_method": "lora", "r": 4, "target_modules": ["q_proj"], option: value}
    with pytest.raises(ConfigError, match=f"{option}: .* is no regular expression"):
        attach(llama(), {"a": made})


def test_usual_patterns_are_matched() -> None:
    made = {"peft_method": "lora", "r": 4, "target_modules": r".*\.(q|v)_proj$", "rank_pattern": {"^model.*q_proj": 2}}
    assert len(attach(llama(), {"a": made}).parameter_names) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": -1}, "r: wanted at least 1, got -1"),
        ({"r": 0}, "r: wanted at least 1, got 0"),
        ({"r": 1.5}, "r: wanted int, got 1.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha: wanted a positive number, got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha: wanted a positive number, got inf"),
        ({"target_modules": [1, 2]}, "target_modules: wanted"),
        ({"target_modules": {"q_proj": 1}}, "target_modules: wanted"),
        ({"target_modules": []}, "target_modules: wanted at least one entry"),
        ({"rank_pattern": {"q_proj": -4}}, "rank_pattern: wanted positive numbers"),
        ({"rank_pattern": [4]}, "rank_pattern: wanted"),
        ({"layers_to_transform": "0"}, "layers_to_transform: wanted"),
        ({"use_dora": "yes"}, "use_dora: wanted bool"),
        ({"lora_dropout": 1.5}, "lora_dropout: wanted at least 0 and less than 1"),
        ({"task_type": 7}, "task_type 7: wanted CAUSAL_LM"),
        ({"peft_type": ["LORA"]}, "names no peft_type"),
    ],
)
def test_values_of_other_types_are_told_by_name(
    change: Mapping[str, Any], words: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert words in refusal(str(tmp_path))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/random", "pipe"])
def test_a_config_that_never_ends_is_not_read(device: str, tmp_path: Path) -> None:
    if device == "pipe":
        os.mkfifo(tmp_path / "adapter_config.json")
    else:
        (tmp_path / "adapter_config.json").symlink_to(device)
    assert "and a file is needed" in refusal(str(tmp_path))
