# SPDX-License-Identifier: Apache-2.0
"""Families of decoders beyond plain attention: served, or refused with a reason in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qeff_validate as qv
from qeff_validate.models.causal_lm.kv_cache import masks

OPTIONS = {"prefill_seq_len": 8, "ctx_len": 32, "max_new_tokens": 6, "batch_size": 3}


def case(kind: str, **more: Any) -> qv.Case:
    return qv.Case(
        name="family", model="peft-causal-lm", source=f"random:{kind}", tolerance="table", options=OPTIONS, **more
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "runtime"), [("deepseek_v3", "ort"), ("deepseek_v2", "torch"), ("llama4_text", "torch")]
)
def test_latent_and_chunked_attention_agree_with_hugging_face(kind: str, runtime: str, tmp_path: Path) -> None:
    report = qv.validate(case(kind), runtimes=[runtime], store=tmp_path)
    assert report.passed, report.results[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama4_text", "deepseek_v2"])
def test_complex_numbers_are_named_as_the_reason_of_a_failed_export(kind: str, tmp_path: Path) -> None:
    (result,) = qv.validate(case(kind), runtimes=["ort"], store=tmp_path).results
    assert "failed: the model computes with complex numbers, which have no form in ONNX" in result.reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "in layers of type linear_attention it keeps a recurrent or convolutional state"),
        ("lfm2", "in layers of type conv it keeps a recurrent or convolutional state"),
        ("qwen3_next", "in layers of type linear_attention it keeps a recurrent"),
        ("falcon_h1", "in layers of type hybrid it keeps a recurrent"),
        ("bloom", "it makes its position biases (ALiBi) from a two-dimensional mask"),
    ],
)
def test_family_that_is_not_served_is_an_error_with_its_reason(kind: str, reason: str, tmp_path: Path) -> None:
    (result,) = qv.validate(case(kind), runtimes=["torch"], store=tmp_path).results
    assert (result.status, result.stage) == ("error", "config")
    assert reason in result.reason
    assert "\n" not in result.reason


def test_tokens_see_their_own_chunk_only() -> None:
    class Config:
        layer_types = ("chunked_attention", "full_attention")
        attention_chunk_size = 4

    by_type = masks(torch.tensor([[3, 4, 6, -1]]), 8, Config, torch.float32)
    assert isinstance(by_type, dict)
    seen = (by_type["chunked_attention"][0, 0] == 0).int().tolist()
    assert seen == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [0] * 8]
