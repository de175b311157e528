# SPDX-License-Identifier: Apache-2.0
"""Refuses implausible sizes in a config before a model is built from it. Importing it loads no framework."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.memory import without_collection
from qeff_validate.models.framework_calls import quiet_transformers
from qeff_validate.models.sources.checkpoint import StoredTensor

LAYERS = re.compile(r"(.*_)?(layers?|blocks|groups|depth)")
"""Keys of a config for numbers of modules."""

SIZES = re.compile(
    r"n_layers?|num_layers|num_hidden_layers|hidden_size|d_model|n_embd|n_heads?|num_attention_heads|intermediate_size"
    r"|vocab_size|max_position_embeddings|n_positions"
)
"""Keys of a config that are at least 1."""

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Keys of a config for the number of stored layers."""

MOST_LAYERS = 1000
"""Eight times the deepest published model."""

MOST: Mapping[str, int] = {"vocab_size": 1 << 22, "num_experts": 1 << 15, "num_local_experts": 1 << 15,
                           "n_routed_experts": 1 << 15}  # fmt: skip
"""Maximum values of other keys: a tokenizer lists the vocabulary, some models build a module for each expert."""

PACKED = 8
"""Maximum number of weights per stored element: quantized weights are packed."""

SPARE = 64 << 20
"""Parameters and buffers that need not be stored: masks, tables of positions."""


def check_sizes(config: Mapping[str, Any], name: str, *, stored: int | None = None) -> None:
    """Refuse a config with implausible sizes.

    Args:
        config: plain data, as in ``config.json``.
        name: prefix of error messages.
        stored: number of tensors in the checkpoint, which has at least one per layer; None: no checkpoint.

    Raises:
        ConfigError: a size is below 1, or beyond its limit.
    """
    for key, value in _integers(config):
        most = MOST_LAYERS if LAYERS.fullmatch(key) else MOST.get(key)
        if most is not None and value > most:
            raise ConfigError(f"{name}: the config says {key}: {value:,}: at most {most:,}")
        if SIZES.fullmatch(key) and value < 1:
            raise ConfigError(f"{name}: the config says {key}: {value:,}: at least 1")

    for key in DEPTHS:
        depth = config.get(key)
        if stored is not None and isinstance(depth, int) and depth > stored:
            raise ConfigError(f"{name}: the config says {key}: {depth:,}, and the weights hold {stored} tensors")


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(key), value


def check_memory(model: Any, name: str) -> None:
    """Refuse a model whose float32 weights are larger than this machine's memory.

    Args:
        model: a torch module, on the meta device.
        name: prefix of error messages.

    Raises:
        ConfigError: the model is too large.
    """
    size, memory = 4 * _numbers(model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ConfigError(
            f"{name}: the weights take {size / 1e9:,.0f} GB in float32, and this machine has {memory / 1e9:,.0f} GB:"
            " make the sizes in its config smaller"
        )


def check_weights(auto: Any, config: Any, stored: Mapping[str, StoredTensor], name: str) -> None:
    """Check stored tensors against a model on the meta device (no weights allocated).

    Args:
        auto: the Auto class of transformers that loads the model.
        config: its transformers config.
        stored: the tensors of the checkpoint.
        name: prefix of error messages.

    Raises:
        ConfigError: the config has far more weights than are stored, or a parameter is stored as integers.
    """
    import torch

    try:
        with without_collection(), torch.device("meta"), quiet_transformers():  # imports the model's classes
            model = auto.from_config(config, trust_remote_code=False)
    except Exception:  # loading will raise the error with a reason
        return
    wanted, available = _numbers(model), sum(_product(tensor.shape) for tensor in stored.values())
    if wanted > PACKED * available + SPARE:
        raise ConfigError(
            f"{name}: the config asks for {wanted:,} numbers, and the weights hold {available:,}:"
            " is it the right config.json?"
        )
    if getattr(config, "quantization_config", None) is not None:
        return
    parameters = {parameter for parameter, _ in model.named_parameters()}
    for key, tensor in stored.items():
        if not tensor.dtype.startswith(("I", "U", "BOOL")):
            continue
        parts = key.split(".")
        names = {".".join(parts[start:]) for start in range(len(parts))}
        names |= {f"{model.base_model_prefix}.{key}"} if hasattr(model, "base_model_prefix") else set()
        if parts[-1] == "weight" or names & parameters:
            raise ConfigError(
                f"{tensor.file}: {key} holds integers ({tensor.dtype}), and weights must be floating-point numbers:"
                " save the model in float32, float16 or bfloat16"
            )


def _numbers(model: Any) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
