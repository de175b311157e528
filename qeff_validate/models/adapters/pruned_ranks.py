# SPDX-License-Identifier: Apache-2.0
"""Ranks that AdaLoRA has pruned: its training leaves each module ranks of its own, and the file says which.

The others are put back as zeros. They add nothing, and PEFT divides by the number of ranks before training, so the
product is the same; all modules and adapters of one ``init_r`` have the same shapes, and share a graph.
Loads no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qeff_validate.errors import ConfigError
from qeff_validate.tensors import Array

PATTERN = "rank_pattern"
PREFIX = "base_model.model."
RANK_AXES: Mapping[str, int] = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
"""Tensors of a module of AdaLoRA, and their dim with one entry a rank."""


def without_pruning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of adapter_config.json without the ranks that remain of a trained AdaLoRA."""
    pruned = str(config.get("peft_type")).upper() == "ADALORA" and isinstance(config.get(PATTERN), dict)
    return {key: value for key, value in config.items() if not (pruned and key == PATTERN)}


def with_all_ranks(config: dict[str, Any], tensors: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return an adapter whose pruned ranks are zeros; other adapters are returned as they are.

    Args:
        config: content of adapter_config.json; AdaLoRA's ``rank_pattern`` has a list of booleans a module.
        tensors: by saved name.

    Raises:
        ConfigError: a tensor has other ranks than the pattern says.
    """
    full = without_pruning(config)
    if len(full) == len(config):
        return config, tensors
    whole = dict(tensors)
    for key, remaining in config[PATTERN].items():
        module = str(key).partition(".lora_E")[0]
        mask = np.array(remaining)
        if mask.dtype != bool or mask.ndim != 1:
            raise ConfigError(f"{PATTERN}: {key}: wanted true or false for each rank, got {remaining!r}")
        for kind, axis in RANK_AXES.items():
            name = f"{PREFIX}{module}.{kind}"
            if name in whole:
                whole[name] = _spread(whole[name], mask, axis, name)
    return full, whole


def _spread(array: Array, mask: Array, axis: int, name: str) -> Array:
    """Return an array with zeros where a rank was pruned."""
    if array.ndim != 2 or array.shape[axis] not in (mask.sum(), mask.size):
        raise ConfigError(
            f"{name} is {list(array.shape)}, and {PATTERN} says that {mask.sum()} of {mask.size} ranks remain"
        )
    if array.shape[axis] == mask.size:
        return array
    shape = [mask.size if at == axis else size for at, size in enumerate(array.shape)]
    whole = np.zeros(shape, array.dtype)
    whole[mask if axis == 0 else (slice(None), mask)] = array
    return whole
