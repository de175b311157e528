# SPDX-License-Identifier: Apache-2.0
"""Mutants: deliberate faults of fixed size, so that what a verdict can find is measured and not believed.

A mutant is one change at one level: of the model's own modules, of an embedding's pooling, of an adapter's tensors, of
an ONNX graph, or of what a session is fed and gives. The tables are `bodies` and `graphs` (both model kinds),
`vectors` (embeddings) and `continuing` (language models with adapters); their magnitudes are part of them, because a
score is only comparable with the next one while the faults stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Literal

import numpy as np

from qeff_validate.errors import IncomparableError
from qeff_validate.protocols import Session, load_entry, registered
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec

Level = Literal["body", "pooling", "adapters", "graph", "session"]


class Inapplicable(IncomparableError):
    """A model has nothing that this mutant could change; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong, with its size; unique within a model kind.
        family: the class it is counted in, such as ``pooling`` or ``positions``.
        level: what it changes, and so what its change is called with:
            ``body``: ``(model, patch)``, the original transformers model, changed through `Patch`;
            ``pooling``: ``(hidden, mask)``, torch tensors ``[batch, seq, hidden]`` and ``[batch, seq]``, in the stead
            of the pooling that was asked for, returns ``[batch, hidden]``;
            ``adapters``: ``(name, adapters)``, returns the tensors that are served for an adapter's name (or ``base``);
            ``graph``: ``(model)``, an `onnx.ModelProto` with its weights inside, changed in place;
            ``session``: ``(session)``, returns the `FaultySession` session.
        change: what is done. Raises `Inapplicable` where there is nothing to change.
        source: where this fault was met: an upstream issue, or a section of ``docs/specs/``.
        gross: nobody may ship it in any precision; bounds that let it through prove nothing.
        ceiling: it is tried on the original model in each run (not ``graph``); else in `selftest` only.
    """

    name: str
    family: str
    level: Level
    change: Callable[..., Any]
    source: str
    gross: bool = False
    ceiling: bool = False

    @contextmanager
    def held(self, model: Any) -> Iterator[None]:
        """Hold a mutant of level ``body`` in a model, which is as it was afterwards; at other levels do nothing.

        Raises:
            Inapplicable: there is nothing to change.
        """
        if self.level != "body":
            yield
            return
        import torch

        if not hasattr(model, "get_input_embeddings"):
            raise Inapplicable("this is no model of transformers")
        with Patch() as patch:
            with torch.no_grad():
                self.change(model, patch)
            yield


def mutants(kind: str) -> tuple[Mutant, ...]:
    """Return the mutants that a model kind declares (`protocols.ModelKind.mutants`); none of an unknown kind."""
    found: list[Mutant] = []
    if kind not in registered("models"):
        return ()
    for table in load_entry("models", kind).mutants:
        module, _, name = table.partition(":")
        found += getattr(import_module(module), name)
    return tuple(found)


class Patch:
    """Changes attributes and tensors of objects, and puts all of it back when it is left.

    Values are set with ``attribute`` and weights with ``tensor``; the last change is undone first.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, such as a submodule, a scale or a method."""
        before = getattr(owner, name)
        places = (vars(owner), getattr(owner, "_modules", {}), getattr(owner, "_parameters", {}))
        own = any(name in place for place in places) or isinstance(getattr(type(owner), name, None), property)
        self._undo.append(lambda: setattr(owner, name, before) if own else delattr(owner, name))
        setattr(owner, name, value)

    def tensor(self, tensor: Any, value: Any) -> None:
        """Write into a torch parameter or buffer."""
        before = tensor.detach().clone()

        def back() -> None:
            tensor.data.copy_(before)

        self._undo.append(back)
        tensor.data.copy_(value)

    def hook(self, handle: Any) -> None:
        """Take over a hook's handle: the hook is removed with the rest."""
        self._undo.append(handle.remove)


class FaultySession:
    """A session with a fault: a subclass or a caller says what happens to feeds and to outputs.

    Args:
        session: the healthy one.
        feed: changes the feeds; the second argument is a copy of the mapping, whose arrays must not be written to.
        out: changes the outputs, which are copies.
        adapters: tensors of ``base`` and each adapter, for faults of what is served.

    Attributes:
        runs: how many runs are behind.
        feeds: what the caller gave in this run.
        last: the healthy outputs of the last run.
    """

    def __init__(
        self,
        session: Session,
        feed: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
        out: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
        adapters: Mapping[str, Tensors] | None = None,
    ) -> None:
        self._session, self._feed, self._out = session, feed, out
        self.adapters: Mapping[str, Tensors] = adapters or {}
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.shapes: tuple[Shapes, ...] = session.shapes
        self.runs = 0
        self.feeds: dict[str, Array] = {}
        self.last: dict[str, Array] = {}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run with the fault."""
        self.feeds = dict(feeds)
        fed = self.feeds if self._feed is None else self._feed(self, dict(feeds))
        found = dict(self._session.run({name: np.ascontiguousarray(array) for name, array in fed.items()}, fetch=fetch))
        given = {name: array.copy() for name, array in found.items()}
        made = given if self._out is None else dict(self._out(self, given))
        self.runs, self.last = self.runs + 1, found
        return made

    def reset(self) -> None:
        """Forget retained state."""
        self._session.reset()


def session_of(
    feed: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
    out: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
) -> Callable[[Session], FaultySession]:
    """Return the change of a mutant of level ``session``."""
    return lambda session: FaultySession(session, feed, out)
