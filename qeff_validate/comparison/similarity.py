# SPDX-License-Identifier: Apache-2.0
"""How vectors are compared, as sentence-transformers' ``similarity_fn_name`` names it; greater is nearer. Float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qeff_validate.tensors import Array

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
"""The last two are negative distances."""


def similarity(name: str, vector: Array, others: Array) -> NDArray[np.float64]:
    """Return the similarity of a vector ``[d]`` with each of others ``[n, d]``, float64 ``[n]``.

    Args:
        name: one of `SIMILARITIES`.
        vector: float.
        others: float.
    """
    a, b = vector.astype(np.float64, copy=False), others.astype(np.float64, copy=False)
    with np.errstate(all="ignore"):
        if name in ("cosine", "dot"):
            scores = b @ a
            if name == "cosine":
                lengths = np.linalg.norm(a) * np.linalg.norm(b, axis=1)
                np.divide(scores, lengths, out=scores, where=lengths != 0)  # a vector of zeros is unlike all others
        else:
            scores = -np.linalg.norm(b - a, ord=1 if name == "manhattan" else 2, axis=1)
    result: NDArray[np.float64] = scores
    return result


def similarity_noise(name: str, vector: Array, others: Array, noise: float) -> NDArray[np.float64]:
    """Return how far relative errors of at most ``noise`` in both vectors move each similarity, float64 ``[n]``.

    By Cauchy–Schwarz 2·noise + noise² for ``cosine``, times both lengths for ``dot``; by the triangle inequality
    noise·(‖a‖ + ‖b‖) for ``euclidean``, times √d for ``manhattan``.
    """
    product = 2 * noise + noise**2
    if name == "cosine":
        return np.full(len(others), product)
    own = np.linalg.norm(vector.astype(np.float64, copy=False))
    lengths = np.linalg.norm(others.astype(np.float64, copy=False), axis=1)
    moved: NDArray[np.float64] = product * own * lengths if name == "dot" else noise * (own + lengths)
    return moved * np.sqrt(others.shape[1]) if name == "manhattan" else moved
