# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention that does not copy keys and values for each head of a group.

The model's own eager attention computes the result. The heads of a group are passed to it as additional tokens of one
head: their queries read the same keys, and a decode step at a long context does not move each key once per head.
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
    """Proxy of an attention module that reports one query head per key head."""

    num_key_value_groups = 1

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute the result of the module's own eager attention.

    Args:
        module: an attention of transformers.
        query: ``[batch, heads, seq_len, head_dim]``.
        key: ``[batch, groups, slots, head_dim]``.
        value: as ``key``.
        attention_mask: additive ``[batch, 1, seq_len, slots]``.
        kwargs: further arguments of the eager attention; with a tensor among them, heads are not grouped.

    Returns:
        ``[batch, seq_len, heads, head_dim]``, and the attention weights if heads were not grouped.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name != "position_ids"]
    if heads == groups or attention_mask is None or attention_mask.shape[1] != 1 or tensors:
        result: tuple[Tensor, Tensor] = eager(module, query, key, value, attention_mask, **kwargs)
        return result
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
