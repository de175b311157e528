# SPDX-License-Identifier: Apache-2.0
"""Completes a user's graph on the host: pools hidden states, and feeds token types that are not part of the interface.

Exporters of transformers write graphs that end in ``last_hidden_state``; the pooling then runs outside of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.config.case import Artifacts
from qeff_validate.protocols import Graph, Session
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec

HIDDEN, TYPES, MASK = ("last_hidden_state", "token_embeddings", "output"), "token_type_ids", "attention_mask"
"""Names of hidden states in files; QEfficient calls all that it exports ``output``."""

VECTOR = "sentence_embedding"
"""The output of optimum's exports of a whole directory of sentence-transformers."""


class FileSession:
    """A session on a user's graph, with pooled vectors in the place of hidden states.

    Args:
        session: open, under the names of the file.
        pooled: name of the one output that is read: ``[batch, seq, hidden]``, which is pooled, or ``[batch, hidden]``;
            None: all are, as they are.
        name: of the vectors.
        mask: name of the mask among the inputs.
        pool: maps the real tokens of a row ``[n, hidden]`` to its vector; None: hidden states are returned as they are.
        hidden_inputs: names of inputs that are fed with zeros.
    """

    def __init__(
        self,
        session: Session,
        pooled: str | None,
        name: str,
        mask: str,
        pool: Callable[[Floats], Floats] | None,
        hidden_inputs: Sequence[str],
    ) -> None:
        self._session, self._pooled, self._name, self._mask, self._pool = session, pooled, name, mask, pool
        self._zeros = [spec for spec in session.inputs if spec.name in hidden_inputs]
        self.inputs: tuple[TensorSpec, ...] = tuple(spec for spec in session.inputs if spec not in self._zeros)
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        if pooled is not None:
            states = next(spec for spec in session.outputs if spec.name == pooled)
            shape = (states.shape[0], "hidden") if len(states.shape) == 3 and pool is not None else states.shape
            self.outputs = (replace(states, name=name, shape=shape, dtype="float32"),)
        shown = {spec.name for spec in (*self.inputs, *session.outputs)}
        self.shapes: tuple[Shapes, ...] = tuple(
            {key: dims for key, dims in shapes.items() if key in shown and key != pooled} for shapes in session.shapes
        )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once, and pool what the file gives."""
        shape = feeds[self._mask].shape
        zeros = {spec.name: np.zeros(shape, dtype=spec.dtype) for spec in self._zeros}
        if self._pooled is None:
            return self._session.run({**feeds, **zeros}, fetch=fetch)
        states = self._session.run({**feeds, **zeros}, fetch=[self._pooled])[self._pooled].astype(np.float64)
        if states.ndim == 2 or self._pool is None:
            return {self._name: states.astype(np.float32)}
        rows = [_vector(self._pool, row, seen > 0) for row, seen in zip(states, feeds[self._mask], strict=True)]
        return {self._name: np.stack(rows).astype(np.float32)}

    def reset(self) -> None:
        """Forget the retained state."""
        self._session.reset()


def _vector(pool: Callable[[Floats], Floats], states: Floats, seen: Array) -> Floats:
    vector = pool(states[seen] if seen.any() else states[:1])
    return vector if seen.any() else np.zeros_like(vector)


def completed(
    session: Session, graph: Graph, artifacts: Artifacts, pool: Callable[[Floats], Floats], words: str
) -> tuple[Session, Sequence[str]]:
    """Return a session that fits the interface as far as pooling and token types go, and what was done for it.

    Args:
        session: on the user's file.
        graph: the interface.
        artifacts: the user's mapping of names.
        pool: pools the tokens of a row.
        words: name the pooling.
    """
    ours = {spec.name for spec in graph.inputs}
    types = artifacts.inputs.get(TYPES, TYPES)
    hidden_inputs = [spec.name for spec in session.inputs if spec.name == types and TYPES not in ours]
    mapped, per_token = artifacts.outputs.get("output"), len(graph.outputs[0].shape) == 3
    ranks = {spec.name: len(spec.shape) for spec in session.outputs}
    known = HIDDEN if per_token else (VECTOR, *HIDDEN)
    read = mapped or next((name for name in known if name in ranks), "")
    others = [name for name in ranks if name != read]
    pooled, said = ranks.get(read) == 3 and not per_token, ""
    if pooled:
        said = f"the file ends in {read}, which is pooled on the host: {words}"
    elif not mapped and ranks.get(read) == len(graph.outputs[0].shape) and (read != "output" or (per_token and others)):
        how = f"as it is{', without ' if others else ''}{', '.join(others)}" if per_token else "pooled as the file does"
        said = f"judged is the file's {read}, {how}"
    findings = [
        *([f"the file takes {types}, which are fed with zeros"] if hidden_inputs else []),
        *([said] if said else []),
    ]
    if not findings:
        return session, ()
    mask, pool_row = artifacts.inputs.get(MASK, MASK), None if per_token else pool
    read_output, name = read if said else None, mapped or "output"
    return FileSession(session, read_output, name, mask, pool_row, hidden_inputs), findings
