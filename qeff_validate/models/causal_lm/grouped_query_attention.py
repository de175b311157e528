# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention that does not copy keys and values for each head of a group.

The authors' eager attention computes everything. It is given the heads of a group as further tokens of one head: their
queries read the same keys anyway, and a step at a long context no longer moves each key as many times as a group has
heads.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "qeff_validate_grouped"


class _UngroupedAttention:
    """An attention module that says of itself that each head has keys of its own."""

    num_key_value_groups = 1

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute what the module's own eager attention does.

    Args:
        module: an attention of transformers.
        query: ``[batch, heads, seq_len, head_dim]``.
        key: ``[batch, groups, slots, head_dim]``.
        value: as ``key``.
        attention_mask: additive ``[batch, 1, seq_len, slots]``.
        kwargs: what the authors give their own; a tensor among them may belong to heads, so nothing is grouped then.

    Returns:
        ``[batch, seq_len, heads, head_dim]``, and the weights where nothing was grouped.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    own = [name for name, given in kwargs.items() if isinstance(given, Tensor) and name != "position_ids"]
    if heads == groups or attention_mask is None or attention_mask.shape[1] != 1 or own:
        found: tuple[Tensor, Tensor] = eager(module, query, key, value, attention_mask, **kwargs)
        return found
    each = heads // groups
    out, _ = eager(
        _UngroupedAttention(module),
        query.reshape(batch, groups, each * length, size),
        key,
        value,
        torch.cat([attention_mask] * each, dim=2),
        **kwargs,
    )
    parts = out.reshape(batch, each, length, groups, -1).permute(0, 2, 3, 1, 4)
    return parts.reshape(batch, length, heads, -1), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)
