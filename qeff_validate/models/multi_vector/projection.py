# SPDX-License-Identifier: Apache-2.0
"""What follows a body in a multi-vector model: modules on the vectors of tokens, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qeff_validate.models.layers import Normalize, load_layer
from qeff_validate.models.sources.sentence_directory import Layer


class Projection(nn.Module):
    """Modules on the vectors of tokens, one after the other: ``[batch, seq, hidden] → [batch, seq, dim]``."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """Return the vectors of all tokens; those of padding have no meaning."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def load_projection(layers: Sequence[Layer]) -> Projection:
    """Return the modules of a directory, in eval mode.

    Raises:
        ConfigError: an option or the weights of a module do not fit.
        Unavailable: the weights cannot be read.
    """
    return Projection([load_layer(layer) for layer in layers]).eval()


def draw_projection(hidden: int, dim: int, seed: int) -> Projection:
    """Return a projection with seeded weights, and a normalization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(hidden, dim, bias=False)
    return Projection([linear, Normalize()]).eval()
