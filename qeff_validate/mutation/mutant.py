# SPDX-License-Identifier: Apache-2.0
"""Mutants: deliberate faults of fixed size, so that the faults that a verdict finds are measured, not assumed.

A mutant is one change at one level: of the transformers model (`ModuleMutant`), of an embedding's pooling
(`PoolingMutant`), of the adapters' tensors (`AdapterMutant`), of an ONNX graph (`GraphMutant`), or of a session's
inputs and outputs (`SessionMutant`). A model kind names its tables of mutants in ``ModelKind.mutants``; magnitudes are
part of a table, because scores are only comparable while the faults stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from qeff_validate.errors import IncomparableError
from qeff_validate.protocols import Session
from qeff_validate.registry import load_entry, registered
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Array, Tensors

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

Level = Literal["body", "pooling", "adapters", "graph", "session"]


class Inapplicable(IncomparableError):
    """A model has nothing that this mutant could change; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault; its subclass says what ``change`` takes and returns.

    Attributes:
        name: what is wrong, with its size; unique within a model kind.
        family: the class it is counted in, such as ``pooling`` or ``positions``.
        change: applies the fault. Raises `Inapplicable` where there is nothing to change.
        source: where this fault was met: an upstream issue, or a section of ``docs/specs/``.
        gross: nobody may ship it in any precision; bounds that let it through prove nothing.
        ceiling: it is tried on the original model in each run (never a graph mutant); else in `selftest` only.
    """

    level: ClassVar[Level]
    name: str
    family: str
    change: Callable[..., Any]
    source: str
    gross: bool = False
    ceiling: bool = False

    @contextmanager
    def applied_to(self, model: Any) -> Iterator[None]:  # noqa: ARG002
        """Apply a `ModuleMutant` to a transformers model for the duration of the context; others do nothing.

        Raises:
            Inapplicable: there is nothing to change.
        """
        yield


@dataclass(frozen=True, slots=True)
class ModuleMutant(Mutant):
    """A fault of the original transformers model: ``change(model, patch)`` changes it through the patch alone."""

    level: ClassVar[Level] = "body"
    change: Callable[[Any, Patch], None]

    @contextmanager
    def applied_to(self, model: Any) -> Iterator[None]:
        """Apply it to a transformers model, which is bit for bit as before when the context ends."""
        import torch

        if not hasattr(model, "get_input_embeddings"):
            raise Inapplicable("this is no model of transformers")
        with Patch() as patch:
            with torch.no_grad():
                self.change(model, patch)
            yield


@dataclass(frozen=True, slots=True)
class PoolingMutant(Mutant):
    """A pooling in place of the one that was asked for.

    ``change(hidden, mask)`` takes torch tensors ``[batch, seq, hidden]`` and ``[batch, seq]`` and returns
    ``[batch, hidden]``.
    """

    level: ClassVar[Level] = "pooling"
    change: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AdapterMutant(Mutant):
    """A fault of the adapters' tensors.

    ``change(name, adapters)`` takes the name of an adapter (or ``base``) and the tensors of ``base`` and of all
    adapters, and returns the tensors that are served for that name.
    """

    level: ClassVar[Level] = "adapters"
    change: Callable[[str, Mapping[str, Tensors]], Tensors]


@dataclass(frozen=True, slots=True)
class GraphMutant(Mutant):
    """A fault of an ONNX graph: ``change(model)`` changes the model, weights included, in place."""

    level: ClassVar[Level] = "graph"
    change: Callable[[ModelProto], None]


@dataclass(frozen=True, slots=True)
class SessionMutant(Mutant):
    """A fault of a session's inputs or outputs: ``change(session)`` returns the session with the fault."""

    level: ClassVar[Level] = "session"
    change: Callable[[Session], FaultySession]


def mutants(kind: str) -> tuple[Mutant, ...]:
    """Return the mutants that a model kind declares (`protocols.ModelKind.mutants`); none of an unknown kind."""
    declared: list[Mutant] = []
    if kind not in registered("models"):
        return ()
    for table in load_entry("models", kind).mutants:
        module, _, name = table.partition(":")
        declared += getattr(import_module(module), name)
    return tuple(declared)


class Patch:
    """A context that changes attributes and tensors of objects and restores all of them at its end.

    Values are set with ``attribute`` and weights with ``tensor``; changes are undone in reverse order.
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
        namespaces = (vars(owner), getattr(owner, "_modules", {}), getattr(owner, "_parameters", {}))
        is_property = isinstance(getattr(type(owner), name, None), property)
        on_instance = is_property or any(name in namespace for namespace in namespaces)
        self._undo.append(lambda: setattr(owner, name, before) if on_instance else delattr(owner, name))
        setattr(owner, name, value)

    def tensor(self, tensor: Any, value: Any) -> None:
        """Write into a torch parameter or buffer."""
        before = tensor.detach().clone()

        def restore() -> None:
            tensor.data.copy_(before)

        self._undo.append(restore)
        tensor.data.copy_(value)

    def hook(self, handle: Any) -> None:
        """Remove a hook, given by its handle, at the end of the context."""
        self._undo.append(handle.remove)


class FaultySession(SessionWrapper):
    """A session with a fault: ``feed`` changes the inputs of the session that it wraps, ``out`` its outputs.

    Args:
        session: the healthy one.
        feed: changes the feeds; the second argument is a copy of the mapping, whose arrays must not be written to.
        out: changes the outputs, which are copies.
        adapters: tensors of ``base`` and each adapter, for faults of the adapters.

    Attributes:
        runs: number of completed runs.
        feeds: the feeds of this run, as the caller gave them.
        last: the healthy outputs of the run before.
    """

    def __init__(
        self,
        session: Session,
        feed: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
        out: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
        adapters: Mapping[str, Tensors] | None = None,
    ) -> None:
        super().__init__(session)
        self._feed, self._out = feed, out
        self.adapters: Mapping[str, Tensors] = adapters or {}
        self.runs = 0
        self.feeds: dict[str, Array] = {}
        self.last: dict[str, Array] = {}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run with the fault."""
        self.feeds = dict(feeds)
        changed = self.feeds if self._feed is None else self._feed(self, dict(feeds))
        contiguous = {name: np.ascontiguousarray(array) for name, array in changed.items()}
        healthy = dict(self.session.run(contiguous, fetch=fetch))
        outputs = {name: array.copy() for name, array in healthy.items()}
        if self._out is not None:
            outputs = dict(self._out(self, outputs))
        self.runs, self.last = self.runs + 1, healthy
        return outputs


def session_of(
    feed: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
    out: Callable[[Any, dict[str, Array]], Mapping[str, Array]] | None = None,
) -> Callable[[Session], FaultySession]:
    """Return the change of a `SessionMutant`: the faults of `FaultySession`, without the session."""
    return lambda session: FaultySession(session, feed, out)
