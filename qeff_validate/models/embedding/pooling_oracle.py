# SPDX-License-Identifier: Apache-2.0
"""Pooling in numpy, for the reference. It shares no code with `pooling`, which is validated against it.

Each function takes the hidden states of the real tokens of one row, ``[n, hidden]`` with n ≥ 1, and returns
``[hidden]`` in float64 (``none``: ``[n, hidden]``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats


def _weighted(tokens: Floats, before: int = 0) -> Floats:
    weights = np.arange(before + 1, before + len(tokens) + 1, dtype=np.float64)
    return np.asarray((weights / weights.sum()) @ tokens)


POOLINGS: Mapping[str, Callable[[Floats], Floats]] = {
    "avg": lambda tokens: np.asarray(np.mean(tokens, axis=0)),
    "cls": lambda tokens: tokens[0],
    "last": lambda tokens: tokens[-1],
    "max": lambda tokens: np.asarray(np.max(tokens, axis=0)),
    "mean": lambda tokens: np.asarray(np.mean(tokens, axis=0)),
    "mean_sqrt_len": lambda tokens: np.asarray(np.sum(tokens, axis=0) / np.sqrt(len(tokens))),
    "none": lambda tokens: tokens,
    "weighted_mean": _weighted,
}


def finish(vectors: Floats, *, normalize: bool, truncate_dim: int | None = None) -> Floats:
    """Truncate, then normalize, vectors along the last axis."""
    vectors = vectors[..., :truncate_dim]
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) if normalize else vectors


def pool_row(tokens: Floats, poolings: Sequence[str], prompt_tokens: int = 0) -> Floats:
    """Return the concatenated vectors of poolings of one row ``[n, hidden]``, without its first tokens.

    A weighted mean keeps the weights of the other tokens. A row with no other token is pooled as it is.
    """
    before = prompt_tokens if len(tokens) > prompt_tokens else 0
    rest = tokens[before:]
    vectors = [_weighted(rest, before) if name == "weighted_mean" else POOLINGS[name](rest) for name in poolings]
    return np.concatenate(vectors, axis=-1)


def pool(tokens: Floats, pooling: str, *, normalize: bool, truncate_dim: int | None = None) -> Floats:
    """Pool the real tokens of one row ``[n, hidden]``, then truncate and normalize."""
    vectors = POOLINGS[pooling](np.asarray(tokens, dtype=np.float64))
    return finish(vectors, normalize=normalize, truncate_dim=truncate_dim)
