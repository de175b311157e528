# SPDX-License-Identifier: Apache-2.0
"""Families of decoders beyond plain attention: served, or refused with a reason in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close

import qeff_validate as qv
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.decoder_state import state_shapes
from qeff_validate.models.causal_lm.kv_cache import masks
from qeff_validate.models.causal_lm.real_rotations import Pair, RealRotations, has_complex_rotations
from qeff_validate.models.causal_lm.recurrent_state import RecurrentLayer
from qeff_validate.models.sources.synthetic import Random, empty_body

OPTIONS = {"prefill_seq_len": 8, "ctx_len": 32, "max_new_tokens": 6, "batch_size": 3}


def case(kind: str, **more: Any) -> qv.Case:
    return qv.Case(
        name="family", model="peft-causal-lm", source=f"random:{kind}", tolerance="table", options=OPTIONS, **more
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "runtime"), [("deepseek_v3", "torch"), ("deepseek_v2", "ort"), ("llama4_text", "ort")]
)
def test_latent_and_chunked_attention_agree_with_hugging_face(kind: str, runtime: str, tmp_path: Path) -> None:
    report = qv.validate(case(kind), runtimes=[runtime], store=tmp_path)
    assert report.passed, report.results[0].reason


@pytest.mark.numeric
def test_rotations_of_pairs_are_those_of_complex_numbers() -> None:
    def rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        turns = torch.polar(torch.ones_like(angle), angle) * 0.5
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        one = torch.view_as_real(numbers * turns.unsqueeze(1).to(x.device)).flatten(3)
        return one + torch.view_as_real(torch.mul(turns[:, None, :, :], numbers)).flatten(3)

    generator = torch.Generator().manual_seed(0)
    x, angle = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 8), (2, 5, 4)))
    with RealRotations():
        pairs = rotated(x, angle)
        assert type(torch.view_as_complex(torch.ones(3, 2))) is Pair
    close(pairs, rotated(x, angle), rtol=0, atol=2e-6)
    assert has_complex_rotations(empty("deepseek_v2"))
    assert not has_complex_rotations(empty("llama"))


def empty(kind: str) -> torch.nn.Module:
    model: torch.nn.Module = empty_body(Random(kind, {}, 0).model_config(), kind)
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cpmant", "it keeps keys of 34 tokens after two, because it puts tokens of its own before each text"),
        ("hrm_text", "transformers itself runs it without its state alone"),
        ("rwkv", "it keeps its state in a form of its own (in its outputs)"),
        ("minimax", "it keeps its state in a form of its own (in a MiniMaxCache)"),
        ("inkling_text", "its attention takes positions from the number of tokens in the cache"),
        ("openai-gpt", "transformers returns no cache of it"),
        ("falcon", "it makes its position biases from a two-dimensional mask"),
    ],
)
def test_family_that_is_not_served_is_an_error_with_its_reason(kind: str, reason: str, tmp_path: Path) -> None:
    config = {"alibi": True} if kind == "falcon" else {}
    (result,) = qv.validate(case(kind, config=config), runtimes=["torch"], store=tmp_path).results
    assert (result.status, result.stage) == ("error", "config")
    assert reason in result.reason
    assert "\n" not in result.reason


TARGETS = {"bloom": ["query_key_value"], "gemma3n_text": ["q_proj"]}
FAMILIES = (
    "mamba", "mamba2", "lfm2", "qwen3_next", "falcon_h1", "granitemoehybrid", "olmo_hybrid", "jamba", "bloom",
    "gemma3n_text", "moshi", "zaya", "gpt_neo",
)  # fmt: skip
"""Recurrent, convolutional and hybrid state, position biases and tables of slots, layers that share keys and values."""


@pytest.mark.parametrize("kind", FAMILIES)
def test_family_agrees_with_hugging_face(kind: str, tmp_path: Path) -> None:
    report = qv.validate(case(kind), runtimes=["torch"], store=tmp_path)
    assert report.passed, report.results[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba", "lfm2", "falcon_h1", "bloom", "gemma3n_text"])
def test_state_is_retained_by_a_graph(kind: str, tmp_path: Path) -> None:
    options = {
        **OPTIONS, "peft_method": "lora",
        "peft": {"init": 0.3, "target_modules": TARGETS.get(kind, ["in_proj"])},
    }  # fmt: skip
    config = {"num_hidden_layers": 1} if kind in ("mamba", "falcon_h1", "bloom") else {}
    one = case(kind, config=config).model_copy(update={"options": options})
    report = qv.validate(one, runtimes=["ort", "sim"], store=tmp_path)
    assert report.passed, [result.reason for result in report.results]


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
@pytest.mark.parametrize("fault", ["kept", "padded"])
def test_state_of_another_text_or_of_padding_fails(
    kind: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = RecurrentLayer._rows

    def changed(self: RecurrentLayer, condition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        first = bool((condition == (self._positions == 0)).all() and (condition != (self._positions < 0)).any())
        return rows(self, condition & (fault == "kept" if not first else fault == "padded"), state)

    monkeypatch.setattr(RecurrentLayer, "_rows", changed)
    (result,) = qv.validate(case(kind), runtimes=["torch"], store=tmp_path).results
    assert result.status == "fail"


def test_rows_start_at_zero_continue_or_stay() -> None:
    old = torch.tensor([[[float("nan")] * 3], [[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    layer = RecurrentLayer({"past_conv.0": old, "past_recurrent.0": old}, torch.tensor([[0], [7], [-1]]))
    new = torch.tensor([[[10.0]], [[11.0]], [[12.0]]])
    whole = layer.update_conv_state(new)
    assert whole[:2].tolist() == [[[0.0, 0.0, 0.0, 10.0]], [[1.0, 2.0, 3.0, 11.0]]]
    layer.update_recurrent_state(layer.recurrent_states[0] * 2)
    results = layer.results()
    assert results["past_conv.0"].tolist() == [[[0.0, 0.0, 10.0]], [[2.0, 3.0, 11.0]], [[4.0, 5.0, 6.0]]]
    assert results["past_recurrent.0"].tolist() == [[[0.0] * 3], [[2.0, 4.0, 6.0]], [[4.0, 5.0, 6.0]]]


def test_tokens_see_their_own_chunk_only() -> None:
    class Config:
        layer_types = ("chunked_attention", "full_attention")
        attention_chunk_size = 4

    by_type = masks(torch.tensor([[3, 4, 6, -1]]), 8, Config, torch.float32)
    assert isinstance(by_type, dict)
    seen = (by_type["chunked_attention"][0, 0] == 0).int().tolist()
    assert seen == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [1] + [0] * 7]


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("t5", "random:t5 is no causal language model: transformers has none of the type 't5'"),
        ("bart", "random:bart is an encoder-decoder, whose decoder also reads another text"),
    ],
)
def test_an_encoder_decoder_is_refused_in_a_sentence(model_type: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Random(model_type, {}, 0).causal_lm()


def test_attention_that_selects_tokens_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        ConfigError, match="DeepseekV32ForCausalLM is not supported: its attention reads the tokens that"
    ):
        state_shapes(Random("deepseek_v32", {}, 0).causal_lm())


def test_an_encoder_with_a_head_is_refused_as_no_decoder() -> None:
    with pytest.raises(ConfigError, match="BertLMHeadModel returns logits alone when it is asked for keys and values"):
        state_shapes(Random("bert", {}, 0).causal_lm())
