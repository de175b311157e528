# SPDX-License-Identifier: Apache-2.0
"""The original model of an embedding behind a session's interface, so that a fault can be tried on it.

Hidden states come from the body as its authors publish it, and the numpy oracle pools the tokens that the mask keeps.
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

KEPT = 1 << 27
"""Bytes of hidden states that are kept, so that faults behind the body, and other poolings, cost no run of it."""


class OriginalSession:
    """Runs the original body on batches.

    Args:
        body: in eval mode.
        graph: whose names it answers to.
        pool: real tokens of a row ``[n, hidden]`` to its vector; ``[n, hidden]`` again if there is no pooling.
        finish: what comes after any pooling.
        dtype: ``float32`` or ``float64``, in which the body computes already; vectors are in it too.
        states: hidden states that are known, by the digest of what was fed; those of further runs are added.
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
    ) -> None:
        self.inputs: tuple[TensorSpec, ...] = graph.inputs
        self.outputs: tuple[TensorSpec, ...] = graph.outputs
        self.body = body
        self.instead: Callable[[Tensor, Tensor], Tensor] | None = None
        """A pooling by another: hidden states ``[batch, seq, hidden]`` and mask to ``[batch, hidden]``."""
        self._pool, self._finish, self._dtype = pool, finish, dtype
        self._states = {} if states is None else states
        self._bytes = sum(array.nbytes for array in self._states.values())

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:  # noqa: ARG002
        """Run one batch."""
        hidden, mask = self._hidden(feeds), feeds["attention_mask"]
        if self.instead is not None:
            with torch.no_grad():
                vectors = self.instead(hidden, torch.from_numpy(mask)).double().numpy()
            return {"output": self._finish(vectors).astype(self._dtype)}
        rows = [self._vectors(states, seen > 0) for states, seen in zip(hidden.double().numpy(), mask, strict=True)]
        return {"output": np.stack(rows).astype(self._dtype)}

    def _vectors(self, states: Floats, seen: Array) -> Floats:
        """Return the vector of a row, or those of its tokens; zeros where there is no token."""
        found = self._finish(self._pool(states[seen] if seen.any() else states[:1]))
        if found.ndim == 1:
            return found if seen.any() else np.zeros_like(found)
        every = np.zeros((len(states), found.shape[1]))
        every[seen] = found if seen.any() else 0.0
        return every

    def _hidden(self, feeds: Tensors) -> Tensor:
        fed = hashlib.sha256()
        for spec in self.inputs:
            fed.update(f"{feeds[spec.name].shape}".encode() + feeds[spec.name].tobytes())
        key = fed.hexdigest()
        if key in self._states:
            return torch.from_numpy(self._states[key])
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with translated_errors("run the Hugging Face model"), torch.no_grad():
            out: Any = self.body(**tensors)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
        if self._bytes + hidden.nbytes <= KEPT:
            self._states[key] = hidden.numpy()
            self._bytes += hidden.nbytes
        return hidden

    def reset(self) -> None:
        """Forget nothing: there is no state."""
