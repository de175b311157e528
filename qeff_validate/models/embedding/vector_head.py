# SPDX-License-Identifier: Apache-2.0
"""What follows the pooling (modules, truncation, normalization), run in an emulated precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.config.case import Precision
from qeff_validate.models.emulation.ensemble import ENSEMBLE, run_ensemble
from qeff_validate.models.emulation.integers import compressed_weights
from qeff_validate.models.emulation.precision import DEPENDS_ON_WEIGHTS, ComputationVariant, RoundedWeights
from qeff_validate.models.layers import normalized


class VectorHead(nn.Module):
    """Modules, truncation and normalization: ``[rows, in] → [rows, out]``.

    Args:
        layers: modules behind the pooling.
        truncate_dim: number of elements that are kept; None: all.
        normalize: scale each vector to length 1.
    """

    def __init__(self, layers: Sequence[nn.Module], truncate_dim: int | None, *, normalize: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.truncate_dim, self.normalize = truncate_dim, normalize

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the vectors behind the head."""
        for layer in self.layers:
            vectors = layer(vectors)
        vectors = vectors[..., : self.truncate_dim]
        return normalized(vectors) if self.normalize else vectors


def emulated_head(head: VectorHead, pooled: Sequence[Floats], precision: Precision) -> list[Floats]:
    """Return what a head makes of the pooled vectors ``[rows, in]`` of each variant of `ENSEMBLE`, in the precision.

    Args:
        head: float32.
        pooled: float64 ``[rows, in]`` of each variant, in the order of `ENSEMBLE`.
        precision: of the computation and the weights.
    """
    inputs = {
        variant.name: torch.from_numpy(rows).to(torch.float32) for variant, rows in zip(ENSEMBLE, pooled, strict=True)
    }

    def run(replica: VectorHead, variant: ComputationVariant) -> Floats:
        vectors = inputs[variant.name]
        setattr(vectors, DEPENDS_ON_WEIGHTS, True)  # the body's
        rows: Floats = replica(vectors).to(torch.float64).numpy()
        return rows

    compressed = compressed_weights(head, precision)
    weights = RoundedWeights(precision.compute)
    return run_ensemble(head, precision.compute, run, weights=weights, compressed=compressed)
