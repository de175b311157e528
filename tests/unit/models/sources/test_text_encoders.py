# SPDX-License-Identifier: Apache-2.0
"""Encoders of encoder-decoders and text towers: built, and loaded from checkpoints that hold more than them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import qeff_validate as qv
from qeff_validate.config.case import Case
from qeff_validate.models.sources.resolve import resolve

SIZES = {"num_layers": 1, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 100}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.tensor([[5, 6, 7, 1]])


def saved(kind: str, folder: Path) -> Any:
    """Save a model with more parts than the encoder, and return the encoder's hidden states of `IDS`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind in ("T5Model", "T5ForConditionalGeneration", "UMT5Model"):
            config = getattr(transformers, f"{kind.partition('Model')[0].partition('For')[0]}Config")(**SIZES)
            model = getattr(transformers, kind)(config).eval()
            encoder = model.get_encoder()
        else:
            name = kind.removesuffix("Model")
            config = getattr(transformers, f"{name}Config")(
                text_config={**TOWER, "vocab_size": 100, "max_position_embeddings": 16},
                vision_config={**TOWER, "image_size": 8, "patch_size": 4},
            )
            model = getattr(transformers, kind)(config).eval()
            encoder = model.text_model
    model.save_pretrained(folder)
    with torch.inference_mode():
        return encoder(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", ["T5Model", "T5ForConditionalGeneration", "UMT5Model", "CLIPModel", "SiglipModel"])
def test_encoder_of_a_larger_checkpoint_is_the_body(kind: str, tmp_path: Path) -> None:
    wanted = saved(kind, tmp_path)
    body = resolve(Case(name="x", source=f"path:{tmp_path}")).body()
    with torch.inference_mode():
        states = body(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state.numpy()
    assert np.array_equal(states, wanted)
    assert not any("decoder" in name or "vision" in name for name, _ in body.named_parameters())


@pytest.mark.parametrize("kind", ["t5", "umt5", "clip", "siglip", "esm", "nemotron"])
def test_random_body_passes_on_torch_and_onnx_runtime(kind: str, tmp_path: Path) -> None:
    case = qv.Case(
        name="x", source=f"random:{kind}", tolerance="table", exporter="torchscript", options={"seq_len": [48]}
    )
    report = qv.validate(case, runtimes=["torch", "ort"], store=tmp_path)
    assert [result.status for result in report.results] == ["pass", "pass"], report.plain()
