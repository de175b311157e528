# SPDX-License-Identifier: Apache-2.0
"""Causal LMs and tokenizers from every kind of source."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.adapters.apply import load_model_and_tokenizer
from qeff_validate.models.sources.gguf import Gguf, parsed_once
from qeff_validate.models.sources.resolve import InMemory
from qeff_validate.models.sources.synthetic import Random

ARCHITECTURES = (
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "stablelm", "starcoder2",
)  # fmt: skip
WINDOWED = ("gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "starcoder2")
UNGROUPED = ("gpt2", "gpt_neox")
"""Each query head of these has keys of its own."""


def ids(rows: int = 3, tokens: int = 12) -> torch.Tensor:
    return torch.randint(5, 900, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_model_is_small_seeded_and_says_more_than_one_token(name: str) -> None:
    model, tokenizer = load_model_and_tokenizer({"source": f"random:{name}", "seed": 2})
    again, _ = load_model_and_tokenizer({"source": f"random:{name}", "seed": 2})
    assert tokenizer is None
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert model.config.num_attention_heads == 4
    assert getattr(model.config, "num_key_value_heads", 4) == (4 if name in UNGROUPED else 2)
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    found = logits(model, ids())
    assert found.std(-1).min() > 0.1, "logits differ clearly between tokens"
    greedy = model.generate(ids(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 12:]
    assert all(len(set(row)) >= 2 for row in greedy.tolist())
    assert len({tuple(row) for row in greedy.tolist()}) == 3


@pytest.mark.numeric
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_so_small_that_short_prompts_reach_beyond_it(name: str) -> None:
    model = Random(name, {}, 0).causal_lm()
    assert model.config.sliding_window == 8
    wide = copy.deepcopy(model.config)
    wide.sliding_window = 100
    other = AutoModelForCausalLM.from_config(wide).eval()
    other.load_state_dict(model.state_dict())
    close(logits(other, ids(tokens=8)), logits(model, ids(tokens=8)), rtol=1e-5, atol=1e-5)
    assert (logits(other, ids()) - logits(model, ids()))[:, -1].abs().max() > 0.01


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_few_and_computed_in_a_way_that_exports(name: str) -> None:
    config = Random(name, {}, 0).causal_lm().config
    assert config._experts_implementation == "batched_mm"
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)


def test_config_overrides_reach_the_model() -> None:
    model, _ = load_model_and_tokenizer(
        {"source": "random:llama", "config": {"vocab_size": 50, "num_hidden_layers": 1}}
    )
    assert model.get_output_embeddings().weight.shape == (50, 64)
    assert len(model.model.layers) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    Random("llama", {"vocab_size": 20}, 5).causal_lm().save_pretrained(folder)
    return folder


def with_tokenizer(saved: Path, folder: Path, **special: str) -> dict[str, str]:
    """The model with a tokenizer of 12 words beside it."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes((saved / name).read_bytes())
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, 12)}}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special).save_pretrained(folder)
    return {"source": f"path:{folder}"}


def test_a_directory_gives_the_model_that_transformers_loads_from_it(saved: Path) -> None:
    model, tokenizer = load_model_and_tokenizer({"source": f"path:{saved}"})
    theirs = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert tokenizer is None
    assert torch.equal(logits(model, ids() % 20), logits(theirs, ids() % 20))


def test_pad_id_zero_is_a_pad_id(saved: Path, tmp_path: Path) -> None:
    _, tokenizer = load_model_and_tokenizer(with_tokenizer(saved, tmp_path, pad_token="<pad>", eos_token="</s>"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)
    assert tokenizer(["w3", "w3 w4"], padding=True)["input_ids"] == [[3, 0], [3, 4]]


def test_a_tokenizer_without_pad_token_pads_with_its_end_token_and_the_log_says_so(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qeff_validate"):
        model, tokenizer = load_model_and_tokenizer(with_tokenizer(saved, tmp_path, eos_token="</s>"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 1)
    assert "no padding token, so the end token '</s>' pads" in caplog.text
    assert model.get_input_embeddings().weight.shape[0] == 20, "embeddings are not resized"


def test_a_tokenizer_with_neither_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a padding token nor an end token"):
        load_model_and_tokenizer(with_tokenizer(saved, tmp_path))


def test_tiny_takes_the_tokenizer_and_a_vocabulary_that_holds_it(saved: Path, tmp_path: Path) -> None:
    given = with_tokenizer(saved, tmp_path, pad_token="<pad>", eos_token="</s>")
    model, tokenizer = load_model_and_tokenizer({"source": given["source"].replace("path:", "tiny:"), "seed": 1})
    assert len(tokenizer) == 12
    assert model.config.vocab_size == 12
    assert not torch.equal(logits(model, ids() % 12), logits(Random("llama", {}, 1).causal_lm(), ids() % 12)[..., :12])


def test_an_in_memory_causal_lm_is_copied() -> None:
    model = Random("llama", {}, 0).causal_lm().train()
    copied = InMemory(model, None).causal_lm()
    assert torch.equal(logits(copied, ids()), logits(model.eval(), ids()))
    copied.get_output_embeddings().weight.data.zero_()
    assert logits(model, ids()).abs().max() > 0
    assert copied.config.use_cache


def test_a_gguf_file_is_a_source_and_its_key_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    key = Gguf(file).body_key()
    with pytest.raises(Unavailable, match=r"cannot load .*model\.gguf: it is cut short, damaged, or no GGUF file"):
        load_model_and_tokenizer({"source": f"path:{file}"})
    monkeypatch.setattr("qeff_validate.models.sources.gguf.versions", lambda *names: dict.fromkeys(names))
    with pytest.raises(Unavailable, match=r"pip install 'qeff-validate\[gguf\]'"):
        load_model_and_tokenizer({"source": f"path:{file}"})
    monkeypatch.undo()
    file.write_bytes(b"GGUG")
    assert Gguf(file).body_key() != key
    with pytest.raises(ConfigError, match=r"nowhere\.gguf does not exist"):
        load_model_and_tokenizer({"source": f"path:{tmp_path / 'nowhere.gguf'}"})


def test_a_gguf_file_is_parsed_once_for_a_load_and_says_the_same(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["<s>", "a", "bc"])
    writer.add_tensor("output.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    reader_class, names = gguf.GGUFReader, gguf.get_tensor_name_map
    plain = reader_class(tmp_path / "model.gguf")
    with parsed_once():
        parsed = gguf.GGUFReader(tmp_path / "model.gguf")
        assert gguf.GGUFReader(tmp_path / "model.gguf") is parsed
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader_class, names)
    assert list(parsed.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert parsed.fields[name].contents() == field.contents()
    assert np.array_equal(parsed.tensors[0].data, np.arange(6, dtype=np.float32).reshape(2, 3))
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-20])
    with pytest.raises(Unavailable, match="it is cut short, damaged, or no GGUF file"):
        Gguf(tmp_path / "model.gguf").causal_lm()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sorce": "random:llama"}, "unknown key 'sorce'. Did you mean 'source'?"),
        ({"revision": None}, "source: is missing"),
        ({"source": "random:llama", "seed": "1"}, "seed: Input should be a valid integer"),
        ({"source": "random:lama"}, "random:lama: transformers knows no such model type. Did you mean 'llama'?"),
        ({"source": "random:llama", "peft_method": "lora", "lora_alfa": 1}, "no option 'lora_alfa'"),
        ({"source": "random:bert", "config": {"hiden": 1}}, "no config key 'hiden'"),
        ("random:llama", "wanted a mapping"),
    ],
)
def test_a_wrong_config_says_what_to_do(given: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model_and_tokenizer(given)
    assert words in str(caught.value)


def test_a_case_and_a_config_with_an_adapter_are_taken_too() -> None:
    case = Case(name="x", model="peft-causal-lm", source="random:llama", seed=3)
    model, _ = load_model_and_tokenizer(case)
    other, _ = load_model_and_tokenizer({"source": "random:llama", "seed": 3, "peft_method": "lora", "r": 2})
    assert torch.equal(logits(model, ids()), logits(other, ids()))
