# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that bitsandbytes and compressed-tensors have quantized: what is read computes as their own layers do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.environments]

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
}
GROUP = 32


@pytest.mark.parametrize(
    ("library", "needs", "quantization"),
    [
        ("bitsandbytes", [], {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bitsandbytes", [], {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
        ("compressed-tensors", ["loguru"], {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    ],
    ids=["nf4", "fp4 with double quantization", "packed int4"],
)
def test_logits_are_those_of_the_library_s_own_layers(
    library: str, needs: list[str], quantization: dict[str, Any], tmp_path: Path
) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, library, *needs], check=True)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, __file__, library, json.dumps(quantization)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
    )


def main(library: str, quantization: dict[str, Any]) -> None:
    """Quantize a small model by a library, read it in both ways, and compare."""
    import torch
    from transformers import AutoModelForCausalLM

    from qeff_validate.config.case import Case
    from qeff_validate.models.sources.resolve import resolve
    from qeff_validate.models.sources.synthetic import Random

    Random("llama", CONFIG, 0).causal_lm().save_pretrained("plain")
    save: Callable[[dict[str, Any]], None] = {"bitsandbytes": save_bitsandbytes}.get(library, save_compressed_tensors)
    save(quantization)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        read = resolve(Case(name="quantized", source="./quantized", model="peft-causal-lm")).causal_lm()
        own = AutoModelForCausalLM.from_pretrained("quantized")
        plain = AutoModelForCausalLM.from_pretrained("plain")
        wanted, actual, before = (model(ids).logits.double() for model in (own, read, plain))
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    error = float((actual - wanted).norm() / wanted.norm())
    change = float((before - wanted).norm() / wanted.norm())
    assert error <= 1e-4, error
    assert change > 1e-2, "nothing was quantized"


def save_bitsandbytes(quantization: dict[str, Any]) -> None:
    """Quantize ``plain`` into ``quantized`` while it is loaded."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(**quantization)
    model = AutoModelForCausalLM.from_pretrained("plain", quantization_config=options, device_map="cpu")
    model.save_pretrained("quantized")


def save_compressed_tensors(quantization: dict[str, Any]) -> None:
    """Quantize ``plain`` into ``quantized``: the scale of each group is that of its greatest weight."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("plain")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**quantization))
    config = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (-1, GROUP))
            module.weight_scale.data = groups.abs().amax(-1) / 7
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained("quantized")
    compressor.update_config("quantized")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
