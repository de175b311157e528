# SPDX-License-Identifier: Apache-2.0
"""Pooling in torch, made to survive fp16, left padding, masked garbage and rows without a token.

Each function takes hidden states ``[batch, seq, hidden]`` (float) and a mask ``[batch, seq]`` (1 = real token) and
returns ``[batch, hidden]`` in the same dtype. None changes its input. A row without a token pools to zeros.
Masked positions are replaced, not multiplied by zero, because 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qeff_validate.errors import ConfigError, suggest

SHARE = 1 / 64
"""A power of two, so that scaling by it is exact."""


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the real tokens.

    Tokens and their number are both scaled down before the sum and the division: the sum of 8192 tokens of size 500
    stays within fp16, and the division rounds once, where a rounded 1/n would shift every element alike.
    """
    real = mask.unsqueeze(-1) > 0
    total = (torch.where(real, hidden, 0.0) * SHARE).sum(dim=1)
    return total / (mask.sum(dim=1, keepdim=True).clamp(min=1).to(hidden.dtype) * SHARE)


def maximum(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the greatest value of each feature over the real tokens."""
    real = mask.unsqueeze(-1) > 0
    lowest = torch.finfo(hidden.dtype).min
    greatest = torch.where(real, hidden, lowest).amax(dim=1)
    return torch.where(real.any(dim=1), greatest, 0.0)


def cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the first real token of each row, wherever padding stands."""
    first = mask.to(torch.int32).argmax(dim=1)
    rows = torch.gather(hidden, 1, first.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
    return torch.where((mask > 0).any(dim=1, keepdim=True), rows, 0.0)


def normalized(vectors: Tensor) -> Tensor:
    """Scale each row to length 1; zeros stay zeros.

    Divides by the greatest element first, so that the sum of squares lies between 1 and the width in any dtype.
    """
    greatest = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / torch.where(greatest > 0, greatest, 1.0)
    return scaled / scaled.square().sum(dim=1, keepdim=True).clamp(min=1.0).sqrt()


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean, "max": maximum, "cls": cls}


class PooledModel(nn.Module):
    """A transformer body with pooling on top: ``input_ids, attention_mask → [batch, hidden]``.

    Args:
        base_model: any body that takes ``input_ids`` and ``attention_mask`` by keyword and returns hidden states
            ``[batch, seq, hidden]`` as ``last_hidden_state`` or first in a tuple.
        pooling: ``mean``, ``max`` or ``cls``.
        normalize: scale each vector to length 1.

    Raises:
        ConfigError: unknown pooling.
    """

    def __init__(self, base_model: nn.Module, pooling: str = "mean", *, normalize: bool = False) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigError(f"no pooling is called {pooling!r}.{suggest(str(pooling), POOLINGS)}")
        self.base_model = base_model
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """Return pooled vectors ``[batch, hidden]`` in the dtype of the hidden states."""
        out = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
        pooled = POOLINGS[self.pooling](hidden, attention_mask)
        return normalized(pooled) if self.normalize else pooled
