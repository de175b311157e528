# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of different rank, scale and target modules as inputs of one graph.

The graph has LoRA layers of the greatest rank in the union of all target modules, with scale 1. The tensors of an
adapter are padded with zeros, its own scale is multiplied into B, and a module that it does not adapt has zeros. All
this leaves ``scale·B·A·x`` of the adapter unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.apply import adapter_tensors, apply_peft
from qeff_validate.models.adapters.base_state import ROWS, BaseState
from qeff_validate.tensors import Array, Tensors

OTHER_PRODUCTS = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "target_parameters", "use_dora",
)  # fmt: skip
"""Options of LoRA with which a layer computes something else than the product of two matrices."""

FACTOR = re.compile(r"\.lora_(embedding_)?(?P<factor>[AB])(\.(weight|bias))?$")


@dataclass(frozen=True, slots=True)
class LoraLayers:
    """The LoRA layers that a config gives a model.

    Attributes:
        ranks: rank of each module, by its name.
        scales: factor on ``B·A``, by the module's name.
        shapes: of the tensors that PEFT saves, by saved name.
        tokens: those whose embeddings the adapter replaces.
    """

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: Sequence[int] = ()


INVOCATION = "alora_invocation_tokens"
"""Option of LoRA that adapters may have in a shared graph if it is the same for all: one product, acting from there."""


def not_shareable(config: PeftConfig, *, same_invocation: bool = False) -> str:
    """Return why an adapter cannot share a graph with others of different options; empty if it can.

    Args:
        config: of the adapter.
        same_invocation: all adapters have the same `INVOCATION`.
    """
    if not isinstance(config, LoraConfig):
        return f"method {str(config.peft_type).rpartition('.')[2].lower()}"
    allowed = (INVOCATION,) if same_invocation else ()
    used = [option for option in OTHER_PRODUCTS if getattr(config, option, None) and option not in allowed]
    if isinstance(config.trainable_token_indices, dict):
        used.append("trainable_token_indices (by layer)")
    return f"option {used[0]}" if used else ""


def lora_layers(model: Any, config: PeftConfig) -> tuple[LoraLayers, Any]:
    """Return the layers that a config gives a model, and the model without them.

    Args:
        model: a causal LM; it is changed in place and restored.
        config: of LoRA.

    Raises:
        ConfigError: the config does not fit the model.
    """
    before = BaseState(model)
    peft_model = apply_peft(model, config)
    ranks, scales = {}, {}
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            ranks[name], scales[name] = module.r["default"], float(module.scaling["default"])
    shapes = {name: array.shape for name, array in adapter_tensors(peft_model).items()}
    tokens = tuple(getattr(config, "trainable_token_indices", None) or ())
    return LoraLayers(ranks, scales, shapes, tokens), before.restore()


def shared_options(configs: Mapping[str, PeftConfig], layers: Mapping[str, LoraLayers]) -> dict[str, Any]:
    """Return the options of the layers that serve all adapters, for `generate_peft_config`; their scale is 1.

    Raises:
        ConfigError: one adapter has LoRA on a module that another one replaces as a whole.
    """
    rank = max(rank for each in layers.values() for rank in each.ranks.values())
    modules = sorted({name for each in layers.values() for name in each.ranks})
    saved = sorted({name for config in configs.values() for name in getattr(config, "modules_to_save", None) or ()})
    for adapter, each in layers.items():
        both = sorted(name for name in each.ranks if name.rpartition(".")[2] in saved or name in saved)
        if both:
            whole = next(name for name, config in configs.items() if getattr(config, "modules_to_save", None))
            raise ConfigError(
                f"adapter {whole!r} replaces {both[0]} (modules_to_save), on which {adapter!r} has LoRA, so they cannot"
                " share a graph: give each a case"
            )
    fan = {"fan_in_fan_out": True} if any(getattr(c, "fan_in_fan_out", False) for c in configs.values()) else {}
    more: dict[str, Any] = {**fan, **({"modules_to_save": saved} if saved else {})}
    invocation = getattr(next(iter(configs.values())), INVOCATION, None)
    if invocation:
        more[INVOCATION] = list(invocation)
    if any(getattr(config, "lora_bias", False) for config in configs.values()):
        more["lora_bias"] = True
    tokens = sorted({token for each in layers.values() for token in each.tokens})
    if tokens:
        more["trainable_token_indices"] = tokens
    return {"peft_method": "lora", "r": rank, "lora_alpha": rank, "target_modules": modules, **more}


def shared_tensors(
    tensors: Tensors, layers: LoraLayers, neutral: Tensors, tokens: Sequence[int] = ()
) -> dict[str, Array]:
    """Return the tensors of an adapter for the shared layers.

    Args:
        tensors: of the adapter, by saved name.
        layers: what its config gives the model.
        neutral: of an adapter of the shared layers without effect, by saved name.
        tokens: those whose embeddings some adapter replaces; the others have the base's.

    Raises:
        ConfigError: a tensor has no place in the shared layers.
    """
    strange = sorted(tensors.keys() - neutral.keys())
    if strange:
        raise ConfigError(f"the shared graph has no place for the adapter's tensor {strange[0]!r}")
    shared = {name: _shared(name, tensors.get(name), layers, array) for name, array in neutral.items()}
    for name in (name for name in tensors if name.endswith(ROWS)):
        rows = neutral[name].copy()
        rows[[list(tokens).index(token) for token in layers.tokens]] = tensors[name]
        shared[name] = rows
    return shared


def _shared(name: str, array: Array | None, layers: LoraLayers, neutral: Array) -> Array:
    match = FACTOR.search(name)
    if match is None:
        return neutral if array is None else array  # a whole module (modules_to_save): the base's, or the adapter's
    if array is None:
        return np.zeros_like(neutral)
    padding = [(0, ours - own) for ours, own in zip(neutral.shape, array.shape, strict=True)]  # of the rank alone
    padded = np.pad(array, padding)
    if match["factor"] == "A":
        return padded
    module = name[: match.start()].removeprefix("base_model.model.")
    scaled: Array = np.asarray(padded * np.float32(layers.scales[module]), dtype=array.dtype)
    return scaled
