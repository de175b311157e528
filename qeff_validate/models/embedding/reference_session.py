# SPDX-License-Identifier: Apache-2.0
"""A session that runs the original embedding model, for applying faults to it.

Hidden states come from the original body, and the numpy oracle pools the tokens that the mask selects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec

CACHE_BYTES = 1 << 27
"""Limit of the cache of hidden states, which spares runs of the body for faults and poolings after it."""


class OriginalSession:
    """Runs the original body on batches.

    Args:
        body: in eval mode, already in ``dtype``.
        graph: the interface whose names it has.
        pool: maps the real tokens of a row ``[n, hidden]`` to its vector, or to ``[n, hidden]`` without pooling.
        finish: truncation and normalization of vectors.
        dtype: ``float32`` or ``float64``, also of the outputs.
        states: cache of hidden states by the digest of the feeds; further runs are added.
        parts: number of poolings whose vectors ``pool`` concatenates; another pooling takes the place of each.
    """

    shapes: tuple[Shapes, ...] = ()

    def __init__(
        self,
        body: Any,
        graph: Graph,
        pool: Callable[[Floats], Floats],
        finish: Callable[[Floats], Floats],
        dtype: str = "float32",
        states: dict[str, Array] | None = None,
        parts: int = 1,
    ) -> None:
        self.inputs: tuple[TensorSpec, ...] = graph.inputs
        self.outputs: tuple[TensorSpec, ...] = graph.outputs
        self.body = body
        self.pooling_override: Callable[[Tensor, Tensor], Tensor] | None = None
        """Replaces the pooling: maps hidden states ``[batch, seq, hidden]`` and the mask to ``[batch, hidden]``."""
        self._pool, self._finish, self._dtype, self._parts = pool, finish, dtype, parts
        self._states = {} if states is None else states
        self._bytes = sum(array.nbytes for array in self._states.values())

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:  # noqa: ARG002
        """Run one batch."""
        hidden, mask = self._hidden(feeds), feeds["attention_mask"]
        if self.pooling_override is not None:
            with torch.no_grad():
                vectors = self.pooling_override(hidden, torch.from_numpy(mask)).double().numpy()
            return {"output": self._finish(np.tile(vectors, self._parts)).astype(self._dtype)}
        rows = [
            self._vectors(states, row_mask > 0) for states, row_mask in zip(hidden.double().numpy(), mask, strict=True)
        ]
        return {"output": np.stack(rows).astype(self._dtype)}

    def _vectors(self, states: Floats, mask: Array) -> Floats:
        """Return the vector of a row, or one vector per token; zeros where there is no token."""
        vectors = self._finish(self._pool(states[mask] if mask.any() else states[:1]))
        if vectors.ndim == 1:
            return vectors if mask.any() else np.zeros_like(vectors)
        padded = np.zeros((len(states), vectors.shape[1]))
        padded[mask] = vectors if mask.any() else 0.0
        return padded

    def _hidden(self, feeds: Tensors) -> Tensor:
        digest = hashlib.sha256()
        for spec in self.inputs:
            digest.update(f"{feeds[spec.name].shape}".encode() + feeds[spec.name].tobytes())
        key = digest.hexdigest()
        if key in self._states:
            return torch.from_numpy(self._states[key])
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with translated_errors("run the Hugging Face model"), torch.no_grad():
            output: Any = self.body(**tensors)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if self._bytes + hidden.nbytes <= CACHE_BYTES:
            self._states[key] = hidden.numpy()
            self._bytes += hidden.nbytes
        return hidden

    def reset(self) -> None:
        """Forget nothing: there is no state."""
