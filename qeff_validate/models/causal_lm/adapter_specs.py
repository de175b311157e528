# SPDX-License-Identifier: Apache-2.0
"""The adapters that a case names: directories, configs, and what identifies them. Loads no framework."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.errors import ConfigError
from qeff_validate.files import expand_user
from qeff_validate.models.adapters.files import (
    CONFIG,
    INDEX,
    content,
    holds_base_weights,
    read_config,
    tensor_shapes,
    vocabulary,
    weight_files,
)
from qeff_validate.models.sources.checkpoint import checked, digests
from qeff_validate.tensors import Tensors

FP16_MOST, FP16_LEAST = 65504.0, 2.0**-25
"""The greatest finite fp16 number, and half of the smallest: beyond them values round to infinity and to zero."""


class AdapterSpecs:
    """The adapters of a case.

    Args:
        named: directory of a saved adapter, or PEFT options of a random one, by the adapter's name.
    """

    def __init__(self, named: Mapping[str, str | Mapping[str, Any]]) -> None:
        self._named = named

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The directories of saved adapters, by the adapter's name."""
        return {name: expand_user(spec) for name, spec in self._named.items() if isinstance(spec, str)}

    def configs(self) -> list[Mapping[str, Any]]:
        """Return the config of each adapter, as its directory or the case has it."""
        named = self._named.items()
        return [read_config(self.folders[name]) if isinstance(spec, str) else spec for name, spec in named]

    def bases(self) -> dict[str, Any]:
        """Return the base that each saved adapter names."""
        return {name: read_config(folder).get("base_model_name_or_path") for name, folder in self.folders.items()}

    def keys(self, *, weights: bool) -> Mapping[str, Any]:
        """Return what identifies each adapter; without weights, only what determines the graph."""
        keys: dict[str, Any] = {}
        for name, spec in self._named.items():
            if isinstance(spec, str):
                folder = self.folders[name]
                config, shapes = content(read_config(folder)), tensor_shapes(folder)
                whole = weights or holds_base_weights(shapes)  # weights that are equal to the base's are no inputs
                files = [folder / file for file in (CONFIG, INDEX) if os.path.lexists(folder / file)]
                keys[name] = digests(checked([*weight_files(folder), *files]), folder) if whole else {"saved": config}
            else:
                keys[name] = {k: v for k, v in spec.items() if weights or k not in ("seed", "init")}
        return keys

    def invocation(self) -> list[int]:
        """Return the invocation tokens of activated LoRA; empty without."""
        return next((config["alora_invocation_tokens"] for config in self.configs() if _is_activated(config)), [])

    def virtual_tokens(self) -> int:
        """Return the greatest number of virtual tokens that an adapter puts before a prompt."""
        counts = [config.get("num_virtual_tokens") for config in self.configs()]
        return max(0, max((count for count in counts if isinstance(count, int)), default=0))

    def vocabulary(self, case: str) -> int:
        """Return the number of tokens that embeddings and heads of saved adapters have; 0 if they bring none.

        Raises:
            ConfigError: they differ.
        """
        rows = {name: size for name, folder in self.folders.items() if (size := vocabulary(tensor_shapes(folder)))}
        if len(set(rows.values())) > 1:
            sizes = ", ".join(f"{name!r} {size}" for name, size in rows.items())
            raise ConfigError(
                f"case {case!r}: adapters bring embeddings or heads for different numbers of tokens"
                f" ({sizes}), and a graph has one vocabulary: give each number a case"
            )
        return max(rows.values(), default=0)


def _is_activated(config: Mapping[str, Any]) -> bool:
    tokens = config.get("alora_invocation_tokens")
    return isinstance(tokens, list) and bool(tokens)


def fp16_notes(name: str, tensors: Tensors) -> Iterator[str]:
    """Yield notes on weights that overflow or underflow in fp16."""
    over = [key for key, array in tensors.items() if (np.abs(array) > FP16_MOST).any()]
    under = sum(int(((np.abs(array) < FP16_LEAST) & (array != 0)).sum()) for array in tensors.values())
    if over:
        yield f"adapter {name}: {len(over)} tensors have values beyond fp16 (65504), first {over[0]}"
    if under:
        yield f"adapter {name}: {under} values are so small that fp16 makes them zero"
