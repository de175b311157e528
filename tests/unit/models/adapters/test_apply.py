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
from bounds import close
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.apply import adapter_tensors, apply_peft, load_adapter_tensors
from qeff_validate.models.adapters.config import ALIASES, METHODS, REFUSED, generate_peft_config
from qeff_validate.models.adapters.files import adapter_fingerprint, read_adapter
from qeff_validate.models.sources.synthetic import Random

QV = ["q_proj", "v_proj"]
IDS = torch.tensor([[5, 9, 200, 44, 120, 12, 81, 3, 99, 10]])

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "adamss": {"r": 4, "num_subspaces": 2, "layers_to_transform": [0]},  # it clusters weights, which takes time
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
        "deft", "delora", "dora", "glora", "gralora", "hira", "hra", "loha", "lokr", "lora", "miss", "peanut",
        "psoft", "pvera", "rslora", "vera")},
}  # fmt: skip
"""What a method needs to fit a model of width 32; q_proj and v_proj are the targets where nothing is said."""


VIRTUAL = ("p_tuning", "prefix_tuning", "prompt_tuning")
"""Methods that learn tokens, and have no target modules."""


def options(method: str) -> dict[str, Any]:
    given = {"num_virtual_tokens": 4} if method in VIRTUAL else {"target_modules": QV}
    return {"peft_method": method, **given, **OPTIONS.get(method, {})}


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


@pytest.mark.numeric
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
    plain, got = logits(base), logits(adapted)[:, -IDS.shape[1] :]  # behind logits of virtual tokens
    assert 0.005 < ((got - plain).norm() / plain.norm()).item() < 2
    folder = saved(adapted, tmp_path / "adapter")
    again = apply_peft(fresh(), {"adapter": folder})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(fresh(), folder)
    assert torch.equal(logits(again), logits(theirs))
    close(logits(again)[:, -IDS.shape[1] :], got, rtol=0, atol=2e-5)
    names = {name for name, tensor in again.named_parameters() if tensor.requires_grad}
    assert names == {name for name, tensor in adapted.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("method", sorted([*METHODS, *ALIASES]))
def test_config_survives_peft_writing_and_reading_it(method: str, tmp_path: Path) -> None:
    config = generate_peft_config(options(method))
    config.save_pretrained(tmp_path)
    theirs = PeftConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(config)
    assert theirs.to_dict() == config.to_dict() == generate_peft_config(config.to_dict()).to_dict()
    assert generate_peft_config({**config.to_dict(), "init": "random"}).to_dict() == config.to_dict()
    assert config.task_type == "CAUSAL_LM"
    assert generate_peft_config(config) is not config


# --- generate_peft_config --------------------------------------------------------------------------


def test_options_stand_flat_or_under_the_method_and_mean_the_same() -> None:
    flat = generate_peft_config({"peft_method": "lora", "r": 4, "lora_alpha": 6, "target_modules": QV})
    nested = generate_peft_config({"peft_method": "lora", "lora": {"r": 4, "lora_alpha": 6}, "target_modules": QV})
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=QV)
    assert flat == nested == theirs


def test_aliases_are_lora_with_one_thing_set() -> None:
    assert generate_peft_config({"peft_method": "rslora"}) == peft.LoraConfig(task_type="CAUSAL_LM", use_rslora=True)
    assert generate_peft_config({"peft_method": "dora", "use_dora": True}).use_dora
    with pytest.raises(ConfigError, match="use_dora: dora means True, got False"):
        generate_peft_config({"peft_method": "dora", "use_dora": False})


def test_keys_of_the_model_and_of_applying_are_no_options() -> None:
    given = {"source": "random:llama", "revision": None, "config": {}, "seed": 1, "init": "random", "use_peft": True}
    assert generate_peft_config({**given, "peft_method": "lora"}) == peft.LoraConfig(task_type="CAUSAL_LM")


def test_pydantic_options_are_taken_as_what_was_set() -> None:
    class Options(BaseModel):
        model_config = ConfigDict(extra="allow")
        peft_method: str
        unset: int = 3

    options_given = Options(peft_method="lora", r=4)  # type: ignore[call-arg]
    assert generate_peft_config(options_given) == peft.LoraConfig(task_type="CAUSAL_LM", r=4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"peft_method": "lorra"}, "PEFT has no method 'lorra'. Did you mean 'lora'?"),
        ({"r": 4}, "peft_method: wanted the name of a method, got None. Known: adalora"),
        ({"peft_method": "xlora"}, "mixes other adapters"),
        ({"peft_method": "lora", "lora_alfa": 4}, "lora has no option 'lora_alfa'. Did you mean 'lora_alpha'?"),
        ({"peft_method": "lora", "task_type": "SEQ_CLS"}, "no option 'task_type'"),
        ({"peft_method": "ia3", "lora_alpha": 4}, "lora_alpha is an option of adalora, lora, "),
        ({"peft_method": "ia3", "lora": {"r": 4}}, "lora: these are options of another method"),
        ({"peft_method": "lora", "r": 4, "lora": {"r": 4}}, "r stands there twice"),
        ({"peft_method": "lora", "r": "8"}, "r: wanted int, got '8': write it without quotes"),
        ({"peft_method": "lora", "r": 0}, "r: wanted at least 1, got 0"),
        ({"peft_method": "lora", "r": -1}, "r: wanted at least 1, got -1"),
        ({"peft_method": "lora", "r": True}, "r: wanted int, got True"),
        ({"peft_method": "lora", "r": 8.0}, "r: wanted int, got 8.0"),
        ({"peft_method": "lora", "r": None}, "r: wanted int, got None"),
        ({"peft_method": "oft", "oft_block_size": -4}, "oft_block_size: wanted at least 0, got -4"),
        ({"peft_method": "oft", "oft_block_size": 4, "r": 4}, "r"),
        ({"peft_method": "lora", "lora_dropout": 1.0}, "lora_dropout: wanted at least 0 and less than 1, got 1.0"),
        ({"peft_method": "lora", "lora_dropout": float("nan")}, "lora_dropout: wanted"),
        ({"peft_method": "fourierft", "scaling": float("inf")}, "scaling: wanted a finite number"),
        ({"peft_method": "lora", "target_modules": []}, "target_modules: wanted at least one entry"),
        ({"peft_method": "lora", "target_modules": 3}, "target_modules: wanted"),
        ({"peft_method": "lora", "rank_pattern": {"q_proj": 0}}, "rank_pattern: wanted positive numbers"),
        ({"peft_method": "lora", "use_dora": "yes"}, "use_dora: wanted bool, got 'yes'"),
        ({"peft_method": "lora", "bias": "non"}, "bias: wanted Literal['none', 'all', 'lora_only'], got 'non'"),
        ({"peft_method": "lora", "init_lora_weights": "pissa"}, "others change weights of the base"),
        ({"peft_method": "lora", "init_lora_weights": "gausian"}, "wanted true, false, 'gaussian'"),
        ({"peft_method": "lora", "layer_replication": [[0, 1]]}, "other layers"),
        ({"peft_method": "adalora"}, "total_step"),
        ({"peft_method": "adalora", "total_step": 5, "r": 4}, "will be ignored"),
        ({"peft_method": "miss", "init_weights": "batt"}, "init_weights"),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS': wanted CAUSAL_LM"),
        ({"peft_type": "LARA"}, "peft_type 'LARA' is no method of this PEFT"),
        ({"peft_method": "lora", "adapter": "/no/such"}, "leave out peft_method"),
        ({"adapter": "/no/such"}, "/no/such does not exist"),
        ("lora", "wanted a mapping with peft_method and its options, got str"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_would(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        generate_peft_config(given)


# --- apply_peft ------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_start_of_peft_has_no_effect_and_seeds_give_the_same_noise(base: Any, fresh: Callable[[], Any]) -> None:
    plain = apply_peft(fresh(), options("lora"))
    assert torch.equal(logits(plain), logits(base))

    def noisy(seed: int, init: Any = "random") -> dict[str, np.ndarray]:
        return adapter_tensors(apply_peft(fresh(), {**options("lora"), "seed": seed, "init": init}))

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other, larger = noisy(1), noisy(1), noisy(2), noisy(1, 0.5)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's generator is left alone"
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    name = next(name for name in first if "lora_B" in name)
    close(larger[name], 10 * first[name], rtol=1e-5)
    assert 0.03 < first[name].std() < 0.07


def test_config_of_peft_and_keywords_do_what_the_mapping_does(fresh: Callable[[], Any]) -> None:
    config = generate_peft_config(options("lora"))
    written = config.to_dict()
    first = adapter_tensors(apply_peft(fresh(), config, seed=4, init="random"))
    second = adapter_tensors(apply_peft(fresh(), {**options("lora"), "seed": 4, "init": "random"}))
    assert config.to_dict() == written, "the caller's config is left as it is"
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_mode_of_the_model_is_kept_and_use_peft_false_returns_it(fresh: Callable[[], Any]) -> None:
    model = fresh()
    assert apply_peft(model, {**options("lora"), "use_peft": False}) is model
    assert apply_peft(model.train(), {**options("lora"), "lora_dropout": 0.5}).training


def structure(model: Any) -> Any:
    return [(name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()], {
        name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "no module 'v_prj'. Did you mean 'v_proj'?"),
        ({"target_modules": ["c_attn"]}, "no module 'c_attn'"),
        ({"target_modules": ["q_proj", "act_fn"]}, "cannot put what LoraConfig says on LlamaForCausalLM"),
        ({"target_modules": "nothing.*"}, "cannot put"),
        ({"exclude_modules": ["vproj"]}, "exclude_modules: LlamaForCausalLM has no module 'vproj'"),
        ({"modules_to_save": ["head"]}, "modules_to_save: LlamaForCausalLM has no module 'head'"),
        ({"rank_pattern": {"layers.7.self_attn.q_proj": 2}}, "rank_pattern: LlamaForCausalLM has no module"),
        ({"layers_to_transform": [0, 2]}, "no target module in layer 2; reached: [0]"),
        ({"init": "rnd"}, "init: wanted peft, random"),
        ({"init": 0}, "init: wanted peft, random"),
        ({"seed": -1}, "seed: wanted an integer of at least 0, got -1"),
        ({"use_peft": "no"}, "use_peft: wanted true or false, got 'no'"),
    ],
)
def test_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    given: Mapping[str, Any], words: str, base: Any, fresh: Callable[[], Any]
) -> None:
    model = fresh()
    before = structure(model)
    with pytest.raises(ConfigError, match=re.escape(words)):
        apply_peft(model, {**options("lora"), **given})
    assert structure(model) == before
    assert torch.equal(logits(model), logits(base))


def test_model_with_an_adapter_is_refused_and_so_is_what_is_no_causal_lm(fresh: Callable[[], Any]) -> None:
    model = fresh()
    adapted = apply_peft(model, options("lora"))
    for again in (adapted, model):
        with pytest.raises(ConfigError, match="has an adapter already"):
            apply_peft(again, options("lora"))
    assert apply_peft(adapted.unload(), options("lora")) is not None
    for other in (torch.nn.Linear(2, 2), Random("bert", {}, 0).body(), None):
        with pytest.raises(ConfigError, match="wanted a causal language model"):
            apply_peft(other, options("lora"))


# --- adapters on disk ------------------------------------------------------------------------------


def test_tensors_are_what_safetensors_reads_under_the_saved_names(lora: Path, fresh: Callable[[], Any]) -> None:
    config, tensors = load_adapter_tensors(lora)
    theirs = load_file(lora / "adapter_model.safetensors")
    assert tensors.keys() == theirs.keys()
    assert all(np.array_equal(tensors[name], theirs[name].numpy()) for name in theirs)
    theirs_config = PeftConfig.from_pretrained(lora)
    assert config.to_dict() == {**theirs_config.to_dict(), "inference_mode": False}
    held = adapter_tensors(apply_peft(fresh(), {"adapter": lora}))
    assert all(np.array_equal(tensors[name], held[name]) for name in held.keys() | tensors.keys())


def changed(lora: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A copy of the adapter with other tensors or another config."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(lora / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = json.loads((lora / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_floats_are_widened_exactly(dtype: torch.dtype, lora: Path, tmp_path: Path) -> None:
    def half(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    _, tensors = read_adapter(changed(lora, tmp_path, half))
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert tensors[name].dtype == np.float32
        assert np.array_equal(tensors[name], tensor.float().numpy())


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: t.pop(FIRST), {}, f"missing: 1 tensors that the adapter lacks: {FIRST!r}"),
        (lambda t: t.update(extra=torch.zeros(1)), {}, "modules: the adapter has tensors for 'extra'"),
        (lambda t: None, {"r": 8}, "the adapter has [4, 32], the config on this model gives [8, 32]"),
        (lambda t: None, {"target_modules": ["k_proj"]}, "tensors for 'q_proj' (nearest: 'k_proj'), 'v_proj'"),
        (lambda t: None, {"target_modules": ["c_attn"]}, "no module 'c_attn'"),
        (lambda t: t[FIRST].fill_(float("nan")), {}, "holds numbers that are not finite"),
        (lambda t: t.update({FIRST: t[FIRST].double()}), {}, f"{FIRST} is F64; wanted one of BF16"),
        (lambda t: t.clear(), {}, "holds no tensor"),
        (lambda t: None, {"peft_type": None}, "names no peft_type"),
        (lambda t: None, {"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS': wanted CAUSAL_LM"),
        (lambda t: None, {"new_option": "on"}, "new_option: 'on': PEFT"),
        (lambda t: None, {"r": "4"}, "r: wanted int, got '4'"),
    ],
)  # fmt: skip
def test_saved_adapter_that_does_not_fit_is_refused_before_anything_is_done(
    change: Callable[[Any], Any], config: Any, words: str, lora: Path, tmp_path: Path, fresh: Callable[[], Any]
) -> None:
    model = fresh()
    before = structure(model)
    with pytest.raises(ConfigError, match=re.escape(words)):
        apply_peft(model, {"adapter": changed(lora, tmp_path, change, **config)})
    assert structure(model) == before


def test_adapter_of_another_base_is_refused(lora: Path) -> None:
    wider = Random("llama", {"hidden_size": 64}, 0).causal_lm()
    with pytest.raises(ConfigError, match=re.escape("has [4, 32], the config on this model gives [4, 64]")):
        apply_peft(wider, {"adapter": lora})
    with pytest.raises(ConfigError, match="has no module 'q_proj'"):
        apply_peft(Random("gpt2", {}, 0).causal_lm(), {"adapter": lora})


def test_option_of_a_newer_peft_that_is_off_is_no_obstacle(lora: Path, tmp_path: Path, fresh: Any) -> None:
    folder = changed(lora, tmp_path, lambda _: None, use_something_new=False, new_config=None)
    assert torch.equal(logits(apply_peft(fresh(), {"adapter": folder})), logits(apply_peft(fresh(), {"adapter": lora})))


def test_pickled_missing_and_broken_files_are_refused(lora: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            load_adapter_tensors(tmp_path)

    refused(r"holds no adapter_config\.json, so it is no adapter of PEFT")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(r"cannot read .*adapter_config\.json")
    (tmp_path / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    refused(r"holds no adapter_model\.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused(r"adapter_model\.bin is a pickle, .*save_pretrained\(NEW_DIR\) writes safetensors")
    weights = (lora / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights[:-4])
    refused(r"adapter_model\.safetensors has .* bytes, and its header names .*: it is cut short")
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    load_adapter_tensors(tmp_path)


def test_weights_beside_other_options_or_noise_are_refused(lora: Path, fresh: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="leave out r"):
        apply_peft(fresh(), {"adapter": lora, "r": 4})
    with pytest.raises(ConfigError, match="has weights already: leave init out"):
        apply_peft(fresh(), {"adapter": lora, "init": "random"})


def test_fingerprint_changes_with_content_and_not_with_origin(lora: Path, tmp_path: Path) -> None:
    def key(name: str, change: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None, **config: Any) -> str:
        return adapter_fingerprint(*read_adapter(changed(lora, tmp_path / name, change, **config)))

    plain = adapter_fingerprint(*read_adapter(lora))
    assert plain == key("same", base_model_name_or_path="elsewhere", peft_version="0", target_modules=QV[::-1])
    other = {
        key("alpha", lora_alpha=9),
        key("rslora", use_rslora=True),
        key("element", lambda t: t[FIRST].view(-1)[0].add_(1e-3)),
        key("name", lambda t: t.update({"x": t.pop(FIRST)})),
        key("shape", lambda t: t.update({FIRST: t[FIRST].reshape(2, -1)})),
        key("dtype", lambda t: t.update({FIRST: t[FIRST].view(torch.int32)})),
    }
    assert len(other | {plain}) == 7
