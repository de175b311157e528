# SPDX-License-Identifier: Apache-2.0
"""What an adapter's directory may hold beside its own weights. The oracle is PEFT's loader of whole directories."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from peft import AdaLoraConfig, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import qeff_validate as qv
from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.apply import apply_peft, load_model_and_tokenizer
from qeff_validate.models.adapters.base_state import BaseState
from qeff_validate.models.adapters.files import read_adapter
from qeff_validate.models.framework_calls import quiet_transformers

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(60))]
SIZES: Mapping[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "pad_token_id": 0,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "vocab_size": len(WORDS),
    "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9 w10 w11 w12 w13"]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"]}

FILES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    # name: base, options of LoRA, how it is saved: grown: tokens that are added; edit: in its config
    "plain": ("untied", {}, {}),
    "biases of targets": ("untied", {"bias": "lora_only"}, {}),
    "all biases": ("untied", {"bias": "all"}, {}),
    "whole head": ("untied", {"modules_to_save": ["lm_head"]}, {}),
    "embeddings beside": ("untied", {}, {"save_embedding_layers": True}),
    "tied embeddings beside": ("tied", {}, {"save_embedding_layers": True}),
    "grown": ("untied", {}, {"grown": 2}),
    "grown modules": ("untied", EMBEDDINGS, {"grown": 2}),
    "grown tied module": ("tied", {"modules_to_save": ["embed_tokens"]}, {"grown": 2}),
    "grown target": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, {"grown": 2}),
    "grown token indices": ("untied", {"trainable_token_indices": [64, 65]}, {"grown": 2}),
    "grown tied token indices": ("tied", {"trainable_token_indices": [64, 65]}, {"grown": 2}),
    "patterns": (
        "untied",
        {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 3}, "layers_to_transform": [1]},
        {"edit": {"lora_alpha": 6.5, "modules_to_save": [], "target_parameters": []}},
    ),
}


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, one with tied embeddings, and every adapter of `FILES` as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("tied", "untied"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=name == "tied"))
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if key.endswith(".bias"):
                        parameter.normal_(std=0.1)
            model.save_pretrained(folder / name)
            tokenizer().save_pretrained(folder / name)
        for name in FILES:
            write(folder, name)
    return folder


def write(folder: Path, name: str) -> None:
    """Save an adapter with random weights; one with more tokens beside a tokenizer that has them."""
    base, options, saving = FILES[name]
    words, grown = tokenizer(), saving.get("grown", 0)
    with quiet_transformers(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT, on saving embeddings
        model = AutoModelForCausalLM.from_pretrained(folder / base)
        if grown:
            words.add_tokens([f"new{number}" for number in range(grown)])
            model.resize_token_embeddings(len(words), mean_resizing=False)
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
        peft_model = get_peft_model(model, config)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if "embeddings" in name:
            model.get_input_embeddings().weight.add_(0.1)
        peft_model.save_pretrained(folder / name, **{k: v for k, v in saving.items() if k not in ("grown", "edit")})
    config_file = folder / name / "adapter_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **saving.get("edit", {})}))
    if grown:
        words.save_pretrained(folder / name)


def case(saved: Path, *names: str, **more: Any) -> qv.Case:
    base, grown = FILES[names[0]][0], any("grown" in FILES[name][2] for name in names)
    options = {"prompts": [*PROMPTS, *(["new0 w1 new1 w2"] if grown else [])], "max_new_tokens": 4, "ctx_len": 32}
    adapters = {name.replace(" ", "-"): str(saved / name) for name in names}
    return qv.Case(
        name="files", model="peft-causal-lm", source=f"path:{saved / base}", tolerance="table",
        options={**options, "adapters": adapters, **more},
    )  # fmt: skip


def loaded_by_peft(folder: Path) -> Any:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoPeftModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.numeric
@pytest.mark.parametrize("name", FILES)
def test_directory_gives_what_the_loader_of_peft_gives(name: str, saved: Path, tmp_path: Path) -> None:
    model = qv.model(case(saved, name))
    inputs = model.inputs(model.tokenize())
    reference = model.reference(inputs, dtype="float32")
    ends = np.cumsum(reference["steps"])
    oracle = loaded_by_peft(saved / name)
    for row, ids in enumerate(inputs.ids, start=len(inputs.ids)):
        rows = slice(ends[row - 1], ends[row])
        text = np.concatenate([ids, reference["tokens"][rows]])
        with torch.no_grad():
            logits = oracle(input_ids=torch.from_numpy(text[None, :-1])).logits[0, ids.size - 1 :]
        close(reference["logits"][rows], logits, rtol=1e-5, atol=1e-5)
        assert reference["tokens"][rows].tolist() == logits.argmax(dim=-1).tolist()
    report = qv.validate(case(saved, name), runtimes=["torch"], store=tmp_path)
    assert report.passed, report.results[0].reason


def pruned(saved: Path, folder: Path, ranks: int) -> Path:
    """Save an AdaLoRA with so many of four ranks left in the second layer, as its training does."""
    options = {"init_r": 4, "total_step": 9, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with quiet_transformers(), torch.no_grad():
        peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "untied"), AdaLoraConfig(**options))
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    names = [name.removeprefix("base_model.model.") for name, _ in peft_model.named_parameters() if "lora_E" in name]
    kept = {name: [at % 2 == 1 or (at < 2 * ranks and "layers.0" in name) for at in range(4)] for name in names}
    peft_model.peft_config["default"].rank_pattern = kept
    peft_model.save_pretrained(folder)
    return folder


@pytest.mark.numeric
def test_ranks_that_adalora_has_pruned_are_zeros_of_a_graph_for_all(saved: Path, tmp_path: Path) -> None:
    folders = {f"keeps-{ranks}": pruned(saved, tmp_path / str(ranks), ranks) for ranks in (0, 1)}
    assert load_file(tmp_path / "0/adapter_model.safetensors")[f"{FIRST}.lora_A"].shape[0] == 2
    adapters = {name: str(folder) for name, folder in folders.items()}
    both = case(saved, "plain", adapters=adapters)
    model = qv.model(both)
    inputs = model.inputs(model.tokenize())
    report = qv.validate(both, runtimes=["torch"], store=tmp_path / "store")
    assert report.passed, report.results[0].reason
    state = apply_peft(load_model_and_tokenizer(both)[0], {"adapter": folders["keeps-0"]})
    with torch.no_grad():
        ids = torch.from_numpy(inputs.ids[1][None])
        close(state(input_ids=ids).logits, loaded_by_peft(folders["keeps-0"])(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_ranks_that_do_not_fit_their_pattern_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = pruned(saved, tmp_path, 0)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for wrong, words in (([True] * 3 + [False], r"\[2, 32\], and rank_pattern says that 3 of 4"), ([1, 2], "true or")):
        config["rank_pattern"] = {f"{FIRST.removeprefix('base_model.model.')}.lora_E": wrong}
        file.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=words):
            read_adapter(folder)


def test_a_directory_of_named_adapters_proposes_one_of_them(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    changed_config(saved, tmp_path / "en")
    with pytest.raises(ConfigError, match=r"directories of their names \(en\): name \S+/en$"):
        read_adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is a file: name the directory"):
        read_adapter(tmp_path / "en" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("names", [("all biases",), ("grown tied module",), ("plain", "grown")], ids="-".join)
def test_replaced_weights_of_the_base_are_inputs_of_the_graph(
    names: tuple[str, ...], saved: Path, tmp_path: Path
) -> None:
    report = qv.validate(case(saved, *names), runtimes=["ort", "sim"], store=tmp_path)
    assert report.passed, [result.reason for result in report.results]


@pytest.mark.slow
def test_measured_bounds_hold_for_replaced_weights_of_the_base(saved: Path, tmp_path: Path) -> None:
    """Weights are rounded once for all runs of the ensemble, and each adapter brings its own biases."""
    measured = case(saved, "all biases").model_copy(update={"tolerance": "auto"})
    report = qv.validate(measured, runtimes=["sim"], store=tmp_path)
    assert report.results[0].status in ("pass", "inconclusive"), report.results[0].reason
    assert "legitimate runs in fp16 are so far off" not in report.results[0].reason


@pytest.mark.parametrize("first", ["whole head", "all biases", "embeddings beside"])
def test_an_adapter_leaves_nothing_of_itself_to_the_next(first: str, saved: Path, tmp_path: Path) -> None:
    names = (first, "plain")
    model = qv.model(case(saved, *names))
    inputs = model.inputs(model.tokenize())
    together = model.reference(inputs, dtype="float32")
    alone = qv.model(case(saved, "plain"))
    reference = alone.reference(alone.inputs(alone.tokenize()), dtype="float32")
    size = int(reference["steps"][len(PROMPTS) * 1 :].sum())
    np.testing.assert_array_equal(together["logits"][-size:], reference["logits"][-size:])
    again = model.reference(inputs, dtype="float32")
    np.testing.assert_array_equal(again["logits"], together["logits"])


def test_seeded_adapters_with_whole_modules_leave_the_base_as_it_is() -> None:
    made = {"peft_method": "lora", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"}
    options = {"adapters": {"a": made}, "prompts": PROMPTS, "max_new_tokens": 2}
    config = {**SIZES, "num_hidden_layers": 1}
    source = {"model": "peft-causal-lm", "source": "random:llama", "config": config, "tolerance": "table"}
    model, plain = (
        qv.model(qv.Case(name="a", **source, options=options)),
        qv.model(qv.Case(name="b", **source, options={**options, "adapters": {}})),
    )
    inputs = model.inputs(model.tokenize())
    base = model.reference(inputs, dtype="float32")["logits"]
    expected = plain.reference(plain.inputs(plain.tokenize()), dtype="float32")["logits"]
    np.testing.assert_array_equal(base[: len(expected)], expected)


def test_base_state_restores_overwritten_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before, structure = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    state = BaseState(model, ["base_model.model.0.base_layer.bias", "base_model.model.1.weight", "a.lora_A.weight"])
    with torch.no_grad():
        model[0].bias.add_(1)
        model[1].weight.zero_()
    model[0].requires_grad_(False)
    model[1] = torch.nn.Identity()
    restored = state.restore()
    assert restored is model
    assert [type(module) for module in model.modules()] == structure
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def shards(folder: Path, target: Path, change: Callable[[dict[str, str]], Any] = lambda names: None) -> Path:
    """Save an adapter's tensors in two files with an index."""
    tensors, target = load_file(folder / "adapter_model.safetensors"), target / "sharded"
    target.mkdir()
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    names = {key: f"adapter_model-{at % 2}.safetensors" for at, key in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({key: tensors[key] for key in names if names[key] == file}, target / file)
    change(names)
    (target / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return target


def test_sharded_adapter_is_that_of_one_file(saved: Path, tmp_path: Path) -> None:
    folder = shards(saved / "plain", tmp_path)
    (_, whole), (_, parts) = read_adapter(saved / "plain"), read_adapter(folder)
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    sharded = case(saved, "plain").model_copy(
        update={"options": {"adapters": {"a": str(folder)}, "prompts": PROMPTS, "max_new_tokens": 2}}
    )
    report = qv.validate(sharded, runtimes=["torch"], store=tmp_path / "store")
    assert report.passed, report.results[0].reason


def test_index_that_leads_out_of_the_directory_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = shards(saved / "plain", tmp_path, lambda names: names.update(a="../plain/adapter_model.safetensors"))
    with pytest.raises(ConfigError, match="names a file that is no safetensors file beside it"):
        read_adapter(folder)


def changed_config(saved: Path, target: Path, **options: Any) -> Path:
    config = json.loads((saved / "plain" / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **options}))
    save_file(load_file(saved / "plain" / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "Convert it to plain LoRA .* path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "'loftq': PEFT changes weights of the base when it loads such an adapter"),
        ({"later": 3, "peft_version": "9.0"}, r"later: 3: PEFT .* has no such option \(the file was written by 9.0\)"),
        ({"enable_lora": [True, False]}, r"enable_lora: \[True, False\]: PEFT .* written by"),
    ],
)
def test_options_that_would_change_the_result_are_refused(
    options: dict[str, Any], words: str, saved: Path, tmp_path: Path
) -> None:
    from qeff_validate.models.adapters.apply import load_adapter_tensors

    with pytest.raises(ConfigError, match=words):
        load_adapter_tensors(changed_config(saved, tmp_path, **options))


@pytest.mark.parametrize("options", [{"later": {"a": None, "b": {}}}, {"later": []}, {"init_lora_weights": "eva"}])
def test_options_without_effect_are_accepted(options: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    from qeff_validate.models.adapters.apply import load_adapter_tensors

    config, _ = load_adapter_tensors(changed_config(saved, tmp_path, **options))
    assert config.init_lora_weights is True


@pytest.mark.parametrize("names", [("whole head", "plain"), ("all biases",), ("grown tied module",)], ids="-".join)
def test_whole_modules_and_biases_are_gathered_by_row(names: tuple[str, ...], saved: Path, tmp_path: Path) -> None:
    report = qv.validate(case(saved, *names, mixed_batch=True), runtimes=["torch"], store=tmp_path)
    assert report.passed, report.results[0].reason


def test_layers_that_have_one_weight_for_all_rows_are_refused_in_a_mixed_batch(saved: Path) -> None:
    model = qv.model(case(saved, "grown token indices", mixed_batch=True))
    with pytest.raises(ConfigError, match=r"mixed_batch: the adapters replace weights of .*token_adapter"):
        model.module()  # type: ignore[attr-defined]


def test_adapters_of_two_vocabularies_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"different numbers of tokens \('whole-head' 64, 'grown' 66\)"):
        qv.model(case(saved, "whole head", "grown")).tokenize()


def test_adapters_that_add_different_tokens_are_refused(saved: Path, tmp_path: Path) -> None:
    other = changed_config(saved, tmp_path)
    words = tokenizer()
    words.add_tokens(["another"])
    words.save_pretrained(other)
    options = {"adapters": {"a": str(saved / "grown"), "b": str(other)}, "prompts": PROMPTS}
    model = qv.model(case(saved, "plain").model_copy(update={"options": options}))
    with pytest.raises(ConfigError, match="'a' and 'b' have added different tokens"):
        model.rows()  # type: ignore[attr-defined]
