# SPDX-License-Identifier: Apache-2.0
"""A session whose outputs have one row for each text: the vectors of its tokens, one after the other. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qeff_validate.protocols import Session
from qeff_validate.tensors import Shapes, Tensors, TensorSpec


class WholeTexts:
    """Puts the vectors of each text into one row, with zeros behind the last, so that relations can compare rows.

    Args:
        session: open; gives ``[batch, seq, dim]``.
        output: the name of its output.
        most: greatest number of tokens of a text.
        side: where padding stands.
    """

    def __init__(self, session: Session, output: str, most: int, side: str) -> None:
        self.session = session
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.shapes: tuple[Shapes, ...] = session.shapes
        self._output, self._most, self._side = output, most, side

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once; the output is ``[batch, most · dim]``."""
        vectors = self.session.run(feeds, fetch=fetch)[self._output]
        batch, _, dim = vectors.shape
        rows = np.zeros((batch, self._most, dim), vectors.dtype)
        for row, (tokens, mask) in enumerate(zip(vectors, feeds["attention_mask"], strict=True)):
            real = tokens[mask > 0]
            rows[row, : len(real)] = real
        return {self._output: rows.reshape(batch, -1)}

    def reset(self) -> None:
        """Forget the retained state of the session."""
        self.session.reset()
