# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens of prompt tuning, P-tuning and prefix tuning: tokens before each prompt, whose content adapters bring.

They have ids beyond the vocabulary and run through the prefill like other tokens, so positions, chunks, padding and the
cache need no code of their own. The adapter's tensor ``prompt_embeddings`` is an input with a retained twin: it holds
the embeddings of the tokens (``prompt``), or their keys and values in all layers (``prefix``). Numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from qeff_validate.errors import ConfigError
from qeff_validate.tensors import Array, Tensors

TENSOR = "prompt_embeddings"
"""PEFT's saved name of an adapter's virtual tokens ``[tokens, width]``."""

KINDS: Mapping[str, Literal["prompt", "prefix"]] = {
    "p_tuning": "prompt", "prefix_tuning": "prefix", "prompt_tuning": "prompt",
}  # fmt: skip
"""What the tensor holds, by PEFT method."""

OTHER_LAYOUTS = frozenset({"bloom", "gpt_bigcode"})
"""Model types whose keys and values PEFT lays out in another way."""


class VirtualTokens(BaseModel):
    """The virtual tokens of a case.

    Attributes:
        kind: what the adapters' tensors hold.
        first: id of the first virtual token; the others follow.
        counts: number of virtual tokens of ``base`` (none) and of each adapter.
    """

    kind: Literal["prompt", "prefix"]
    first: int
    counts: dict[str, int]

    def fed(self, name: str, ids: Sequence[Array]) -> tuple[Array, ...]:
        """Return prompts with the virtual tokens of an adapter before them."""
        virtual = self.first + np.arange(self.counts[name], dtype=np.int64)
        return tuple(np.concatenate([virtual, tokens]) for tokens in ids)


def virtual_tokens(
    configs: Mapping[str, Any], tensors: Mapping[str, Tensors], base: str, sizes: Mapping[str, int], model_type: str
) -> tuple[VirtualTokens, dict[str, dict[str, Array]]]:
    """Return the virtual tokens of adapters, and their tensors padded with zeros to the same number of tokens.

    Args:
        configs: PEFT config of each adapter.
        tensors: of each adapter, by saved name.
        base: name of the model without an adapter.
        sizes: ``vocab``, ``hidden`` and ``cache``: number of tokens, width of embeddings, of all keys and values.
        model_type: of the base.

    Raises:
        ConfigError: other methods stand beside them, or a tensor does not fit the base.
    """
    kinds = {name: KINDS.get(str(config.peft_type).rpartition(".")[2].lower()) for name, config in configs.items()}
    if len(set(kinds.values())) > 1:
        groups: dict[Any, list[str]] = {}
        for name, kind in kinds.items():
            groups.setdefault(kind, []).append(name)
        cases = "; ".join(", ".join(names) for names in groups.values())
        raise ConfigError(
            "adapters with virtual tokens cannot share a graph with those of another kind (embeddings: prompt_tuning,"
            f" p_tuning; keys and values: prefix_tuning; weights: the rest). Give each of these groups a case: {cases}"
        )
    kind = next(iter(kinds.values()))
    assert kind is not None
    if kind == "prefix" and model_type in OTHER_LAYOUTS:
        raise ConfigError(
            f"prefix_tuning on {model_type}: PEFT lays out its keys and values in another way; not served"
        )
    width = sizes["hidden" if kind == "prompt" else "cache"]
    for name, arrays in tensors.items():
        shape = arrays[TENSOR].shape if set(arrays) == {TENSOR} else None
        if shape is None or len(shape) != 2 or shape[1] != width:
            what = "embeddings" if kind == "prompt" else "keys and values of all layers"
            raise ConfigError(
                f"adapter {name!r}: wanted the tensor {TENSOR} [tokens, {width}], the {what} of virtual tokens on this"
                f" base, got {sorted(arrays)} {'' if shape is None else list(shape)}: it was trained on another base"
            )
    counts = {base: 0, **{name: len(arrays[TENSOR]) for name, arrays in tensors.items()}}
    most = max(counts.values())
    padded: dict[str, dict[str, Array]] = {base: {TENSOR: np.zeros((most, width), dtype=np.float32)}}
    for name, arrays in tensors.items():
        padded[name] = {TENSOR: np.pad(arrays[TENSOR], [(0, most - counts[name]), (0, 0)])}
    return VirtualTokens(kind=kind, first=sizes["vocab"], counts=counts), padded
