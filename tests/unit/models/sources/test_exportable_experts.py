# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts from a directory and from memory: they export, and the reference runs as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from transformers import AutoConfig, AutoModelForCausalLM

from qeff_validate import model
from qeff_validate.config.case import Case
from qeff_validate.engine import Runner
from qeff_validate.models.causal_lm.wrapper import Decoder
from qeff_validate.models.sources.exportable_experts import exportable_experts

SIZES: dict[str, Any] = {
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
    "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.2,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16, "decoder_sparse_step": 1},
}
OPTIONS = {"prompts": ["w5 w17 w33", "w9 w8"], "prefill_seq_len": 2, "ctx_len": 12, "max_new_tokens": 2}


def mixture(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).float().eval()


def case(**more: Any) -> Case:
    return Case(name="x", model="peft-causal-lm", options=OPTIONS, **more)


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{n}" for n in range(60))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_mixture_exports_and_gives_what_transformers_gives(family: str, tmp_path: Path) -> None:
    mixture(family).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    result = Runner(store=tmp_path / "store").result(
        case(source=f"path:{tmp_path / 'model'}", tolerance="table"), "ort"
    )
    assert result.status == "pass", result.reason


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reference_of_a_mixture_is_that_of_transformers_in_each_dtype(family: str, dtype: str) -> None:
    given = mixture(family)
    before = given.config._experts_implementation
    wrapper = model(case(source="random:bert"), given=given)
    inputs = wrapper.inputs(wrapper.tokenize())
    logits = wrapper.reference(inputs, dtype=dtype)["logits"]
    plain = mixture(family)
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        theirs = plain.to(getattr(torch, dtype))(torch.from_numpy(inputs.ids[0])[None]).logits[0, -1]
    bound = {"float32": 1e-4, "float64": 1e-11}[dtype]
    close(logits[0], theirs, rtol=bound, atol=bound)
    assert given.config._experts_implementation == before, "the caller's model is left as it is"


def test_experts_are_computed_otherwise_only_in_the_module_that_is_exported() -> None:
    plain, wrapped = mixture("mixtral"), mixture("mixtral")
    assert plain.config._experts_implementation != "batched_mm"
    with exportable_experts(plain):
        assert plain.config._experts_implementation == "batched_mm"
    assert plain.config._experts_implementation == wrapped.config._experts_implementation
    Decoder(wrapped, 1)
    assert wrapped.config._experts_implementation == "batched_mm"
    assert plain.config._experts_implementation != "batched_mm"
