# SPDX-License-Identifier: Apache-2.0
"""The base of sessions that change or observe another session."""

from __future__ import annotations

from collections.abc import Sequence

from qeff_validate.protocols import Session
from qeff_validate.tensors import Shapes, Tensors, TensorSpec


class SessionWrapper:
    """A `protocols.Session` that forwards everything to another; subclasses override what they change.

    Args:
        session: open; the wrapper does not close it.

    Attributes:
        session: the wrapped session.
        inputs: specs of the wrapped session.
        outputs: specs of the wrapped session.
        shapes: allowed combinations of shapes of the wrapped session.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.shapes: tuple[Shapes, ...] = session.shapes

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run the wrapped session once; arguments and errors are those of `protocols.Session.run`."""
        return self.session.run(feeds, fetch=fetch)

    def reset(self) -> None:
        """Forget the retained state of the wrapped session."""
        self.session.reset()
