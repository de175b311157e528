# SPDX-License-Identifier: Apache-2.0
"""The pooling of SPLADE in torch: log-saturated logits, pooled over the real tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from qeff_validate.models.head_model import Head


def splade(pooling: str, activation: str) -> Head:
    """Return the function on logits ``[batch, seq, vocabulary]`` and mask ``[batch, seq]``.

    Its result is ``[batch, vocabulary]``; a row without a token is zeros.
    """

    def pool(logits: Tensor, mask: Tensor) -> Tensor:
        weights = torch.log1p(torch.relu(logits))
        if activation == "log1p_relu":
            weights = torch.log1p(weights)
        weights = torch.where(mask.unsqueeze(-1) > 0, weights, 0.0)
        return weights.amax(dim=1) if pooling == "max" else weights.sum(dim=1)

    return pool
