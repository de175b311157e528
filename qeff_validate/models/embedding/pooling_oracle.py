# SPDX-License-Identifier: Apache-2.0
"""Pooling in numpy, for the reference. It shares no code with `pooling`, which is validated against it.

Each function takes the hidden states of the real tokens of one row, ``[n, hidden]`` with n ≥ 1, and returns
``[hidden]`` in float64 (``none``: ``[n, hidden]``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats


def _weighted(tokens: Floats) -> Floats:
    weights = np.arange(1, len(tokens) + 1, dtype=np.float64)
    return np.asarray((weights / weights.sum()) @ tokens)


POOLINGS: Mapping[str, Callable[[Floats], Floats]] = {
    "avg": lambda tokens: np.asarray(np.mean(tokens, axis=0)),
    "cls": lambda tokens: tokens[0],
    "last": lambda tokens: tokens[-1],
    "max": lambda tokens: np.asarray(np.max(tokens, axis=0)),
    "mean": lambda tokens: np.asarray(np.mean(tokens, axis=0)),
    "none": lambda tokens: tokens,
    "weighted_mean": _weighted,
}


def finish(vectors: Floats, *, normalize: bool, truncate_dim: int | None = None) -> Floats:
    """Truncate, then normalize, vectors along the last axis."""
    vectors = vectors[..., :truncate_dim]
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) if normalize else vectors


def pool(tokens: Floats, pooling: str, *, normalize: bool, truncate_dim: int | None = None) -> Floats:
    """Pool the real tokens of one row ``[n, hidden]``, then truncate and normalize."""
    vectors = POOLINGS[pooling](np.asarray(tokens, dtype=np.float64))
    return finish(vectors, normalize=normalize, truncate_dim=truncate_dim)
