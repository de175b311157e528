# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: what is dequantized equals numpy's product of codes and scales; the rest names the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qeff_validate as qv
from qeff_validate.errors import ConfigError, Unavailable, ValidateError
from qeff_validate.models.sources.quantized import dequantized, quantization_notes
from qeff_validate.models.sources.resolve import resolve
from qeff_validate.models.sources.synthetic import Random

SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    Random("llama", SMALL, 0).causal_lm().save_pretrained(folder)
    return folder


def quantized(plain: Path, folder: Path, quantization: Any, tensors: dict[str, torch.Tensor] | None = None) -> qv.Case:
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors or load_file(plain / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    return qv.Case(name="quantized", model="peft-causal-lm", source=f"path:{folder}")


def test_fp8_blocks_are_multiplied_by_their_scales(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    wanted = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scales = torch.rand(2, tensors[name].shape[1] // 16) + 0.5
        scales = scales[: max(1, tensors[name].shape[0] // 16)]
        codes = tensors[name].to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        wanted[name] = codes.float().numpy() * np.kron(scales.numpy(), np.ones((16, 16), np.float32))
    options = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    model = resolve(quantized(plain, tmp_path, options, tensors)).causal_lm()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, tensor in model.named_parameters():
        np.testing.assert_array_equal(tensor.detach().numpy(), wanted[name])
    assert "quantized with fp8" in next(quantization_notes(tmp_path))
    assert list(quantization_notes(plain)) == []


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def scaled(plain: Path, name: str, value: float = 2.0) -> dict[str, torch.Tensor]:
    """Projections of a checkpoint as 8-bit floats, each with a scale of a name; no name, no scale."""
    tensors = load_file(plain / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        if name:
            tensors[key.removesuffix("weight") + name] = torch.tensor(value)
    return tensors


def test_fp8_tensors_are_multiplied_by_their_scale_and_casts_are_read_as_they_are(plain: Path, tmp_path: Path) -> None:
    for name, options, factor in (("weight_scale_inv", FP8, 2.0), ("", None, 1.0)):
        tensors = scaled(plain, name)
        weights = dict(resolve(quantized(plain, tmp_path, options, tensors)).causal_lm().named_parameters())
        key = "model.layers.0.self_attn.q_proj.weight"
        np.testing.assert_array_equal(weights[key].detach().numpy(), factor * tensors[key].float().numpy())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("", FP8, "7 tensors of 8-bit floats without a scale, first model.* says fp8: take the config.json"),
        ("weight_scale", FP8, r"7 tensors of quantized weights that were not read, first \S+weight_scale, and .* fp8:"),
        ("weight_scale", None, "not read, first .* names no quantization_config: take the config.json"),
    ],
)
def test_scales_that_are_not_read_are_an_error(name: str, options: Any, said: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(quantized(plain, tmp_path, options, scaled(plain, name))).causal_lm()


@pytest.mark.parametrize(
    ("quantization", "error", "said"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            Unavailable,
            "gptq, and gptqmodel .* pip install gptqmodel optimum,",
        ),
        ({"quant_method": "awq", "bits": 4}, Unavailable, "awq, and gptqmodel turns"),
        ({"load_in_4bit": True}, Unavailable, "bitsandbytes, and bitsandbytes turns"),
        ({"quant_method": "compressed-tensors"}, Unavailable, "pip install compressed-tensors"),
        ({"quant_method": "hqq"}, ConfigError, "'hqq', which is not turned into float32 here .*save it dequantized"),
        ({"bits": 4}, ConfigError, "names no quant_method"),
        ({}, ConfigError, "names no quant_method"),
        ("int4", ConfigError, "names no quant_method"),
    ],
)
def test_what_is_not_dequantized_names_the_library(
    quantization: Any, error: type[ValidateError], said: str, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        resolve(quantized(plain, tmp_path, quantization)).causal_lm()


class Packed(nn.Module):
    """A layer with a packed weight, as GPTQModel's are; those for GPTQ unpack it, ``[in, out]``, others compute."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.in_features = 2
        self.register_buffer("qweight", torch.arange(6, dtype=torch.int32).reshape(2, 3))
        self.register_buffer("scales", torch.full((1, 3), 0.5, dtype=torch.float16))
        self.bias = nn.Parameter(torch.ones(3, dtype=torch.float16))
        if does == "unpacks":
            self.dequantize_weight = lambda: self.qweight.half() * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float16, "its kernels take the dtype of the scales alone"
        product = x @ (self.qweight * self.scales)
        return product if self.bias is None else product + self.bias


@pytest.mark.parametrize("does", ["unpacks", "computes"])
def test_packed_layers_become_linear(does: str) -> None:
    model = dequantized(nn.Sequential(Packed(does)), "awq")
    x = torch.tensor([[1.0, -2.0]])
    np.testing.assert_array_equal(model(x).detach().numpy(), x.numpy() @ np.arange(6).reshape(2, 3) / 2 + 1)


def test_weights_that_stay_packed_are_an_error() -> None:
    layer = nn.Module()
    layer.register_buffer("weight_packed", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"gptq: 1 weights are packed .* first 0\.weight_packed"):
        dequantized(nn.Sequential(layer), "gptq")
