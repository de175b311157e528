# SPDX-License-Identifier: Apache-2.0
"""Cloud AI 100 through ``qaicrt``: one adapter for a card (``ai100``) and for the simulated SDK (``sim``).

The call sequence, its order and its failure texts are those of card-contract §2.5, §4 and §8. What shipping clients
leave unchecked is checked here: the status of ``activate``, names, dtypes (a card sees only item size and dims) and
shapes before the call, and whether an output was written at all (buffers start out as NaN).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.protocols import Capabilities, Session, Settings
from qeff_validate.runtimes.qaic_calls import Calls, check_count, devices, held
from qeff_validate.sdk.locate import Sdk, installed, simulated
from qeff_validate.tensors import (
    Array,
    Shapes,
    Tensors,
    TensorSpec,
    check_feeds,
    retained,
    undefined,
    wanted_outputs,
)

TIMEOUT_MS = 60_000
"""What shipping clients set as data path timeout (card-contract §2.4)."""

# card-contract §3.1, by number, because the generated module may lack the newest names
DTYPES = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "uint8",
    4: "int16",
    5: "int32",
    6: "int32",
    7: "int64",
    8: "int8",
}

_SKIPPED: Array = np.empty(0, dtype=np.uint8)
"""No bytes, dims [0]: how a binding is skipped (card-contract §4.4)."""


class QaicRuntime:
    """Opens ``qpc`` artifacts with the bindings of an SDK.

    Args:
        name: ``ai100`` or ``sim``.
        sdk: whose bindings and compiler.
        settings: cards to use.
    """

    kind: Kind = "qpc"

    def __init__(self, name: str, sdk: Sdk, settings: Settings | None = None) -> None:
        self.name = name
        self.sdk = sdk
        self.settings = settings or Settings()

    @property
    def capabilities(self) -> Capabilities:
        """Programs compute in the case's precision; whether they are simulated, the SDK says."""
        return Capabilities(compute=None, simulated=self.sdk.simulated, sdk=self.sdk)

    def probe(self) -> str | None:
        """Return None if a program can be run here, else why not and what to do."""
        return self.sdk.why_not()

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Load and activate a QPC; the program is released however the context ends.

        Raises:
            Unavailable: no SDK, no card, or bindings that are simulated where a card was asked for.
            RunError: the runtime refuses the QPC, the card or the activation.
        """
        rt, aicapi = self.sdk.bindings()
        if getattr(rt, "SIMULATED", False) != self.sdk.built_in:
            raise Unavailable(f"{rt.__file__} says that it is simulated, and {self.name} means a real card: use sim")
        qids = self._cards(artifact)
        with ExitStack() as locks:
            if not self.sdk.built_in:
                locks.enter_context(held(qids))
            with self._active(rt, aicapi, qids, artifact) as session:
                yield session

    @contextmanager
    def _active(self, rt: Any, aicapi: Any, qids: tuple[int, ...], artifact: Artifact) -> Iterator[Session]:
        call = Calls(rt, artifact, qids)
        context = call.make("Context", lambda: rt.Context(rt.QIDList(list(qids))))
        queue = call.make("Queue", lambda: rt.Queue(context, qids[0]))
        qpc = call.make("Qpc", lambda: rt.Qpc(str(artifact.path)))
        data = bytes(call.value("getIoDescriptor", qpc.getIoDescriptor))
        description = call.make("Qpc", lambda: aicapi.IoDesc.FromString(data))
        session = QaicSession(rt, call, queue, description)  # may refuse, so before the card is taken
        properties = _properties(rt, qids)
        one = qids[0] if len(qids) == 1 else None
        program = call.make("Program", lambda: rt.Program(context, one, qpc, properties))
        undo: list[tuple[str, Any]] = []
        try:
            call.ok("load", program.load, facts=True)
            undo.append(("unload", program.unload))
            call.ok("activate", program.activate, facts=True)
            undo.append(("deactivate", program.deactivate))
            session.start(call.make("ExecObj", lambda: rt.ExecObj(context, program)))
            yield session
        except BaseException:
            _released(call, session, undo)  # what comes out of it is less than what went wrong first
            raise
        problem = _released(call, session, undo)
        if problem is not None:
            raise problem

    def _cards(self, artifact: Artifact) -> tuple[int, ...]:
        """Return the cards to use: those that are named, else as many as needed of those with most free cores."""
        if self.settings.device_ids:
            check_count(artifact, self.settings.device_ids)
            return self.settings.device_ids
        wanted, ready = devices(artifact) or 1, self.sdk.ready()
        if len(ready) < wanted:
            raise Unavailable(
                f"{artifact.path} is compiled for {wanted} cards, and {len(ready)} are Ready: qaic-util -q"
            )
        return tuple(card.qid for card in ready[:wanted])


def ai100(settings: Settings) -> QaicRuntime:
    """Return the runtime for a card, with the installed SDK."""
    return QaicRuntime("ai100", installed(settings.sdk), settings)


def sim(settings: Settings) -> QaicRuntime:
    """Return the runtime for the simulated SDK."""
    return QaicRuntime("sim", simulated(), settings)


def _properties(rt: Any, qids: Sequence[int]) -> Any:
    properties = rt.QAicProgramProperties()
    # attributes come and go between SDK versions, and setting an unknown one raises (§2.4)
    if hasattr(properties, "dataPathTimeoutMs"):
        properties.dataPathTimeoutMs = TIMEOUT_MS
    if len(qids) > 1:
        if not hasattr(properties, "devMapping"):
            raise RunError(
                "QAicProgramProperties of this SDK has no attribute devMapping, so it runs no QPC on several cards:"
                " name one card, or install another Platform SDK"
            )
        properties.devMapping = ":".join(map(str, qids))
    return properties


def _released(call: Calls, session: QaicSession, undo: Sequence[tuple[str, Any]]) -> RunError | None:
    """Undo every step, last first, and return the first error."""
    session.close()  # the ExecObj must be gone before deactivate (§2.5)
    problems = []
    for what, method in reversed(undo):
        try:
            call.ok(what, method)
        except RunError as exc:
            problems.append(exc)
    return problems[0] if problems else None


class QaicSession:
    """An active program with one execution object, from `start` to `close`."""

    def __init__(self, rt: Any, call: Calls, queue: Any, description: Any) -> None:
        self._rt, self._call, self._queue = rt, call, queue
        self._execobj: Any = None
        self._runs = 0
        self.simulated = bool(getattr(rt, "SIMULATED", False))
        self._bindings = sorted(description.selected_set.bindings, key=lambda binding: binding.index)
        names = [binding.name for binding in self._bindings]
        dtypes = [_dtype(binding) for binding in self._bindings]
        combos = [[tuple(shape.dims) for shape in allowed.shapes] for allowed in description.allowed_shapes]
        combos = combos or [[tuple(binding.dims) for binding in self._bindings]]
        if len(set(names)) != len(names) or any(len(dims) != len(names) for dims in combos):
            raise RunError(
                f"{call}: its description has {len(names)} bindings, and names or shapes that do not fit them"
            )
        if any(dim < 0 for shapes in combos for dims in shapes for dim in dims):
            raise RunError(f"{call}: its description has negative dims")
        self.shapes: tuple[Shapes, ...] = tuple(dict(zip(names, dims, strict=True)) for dims in combos)
        specs = [
            TensorSpec(name, dtype, _symbolic(name, [shapes[name] for shapes in self.shapes]))
            for name, dtype in zip(names, dtypes, strict=True)
        ]
        is_input = [binding.dir == 0 for binding in self._bindings]
        self.inputs: tuple[TensorSpec, ...] = tuple(s for s, inside in zip(specs, is_input, strict=True) if inside)
        self.outputs: tuple[TensorSpec, ...] = tuple(s for s, inside in zip(specs, is_input, strict=True) if not inside)
        skippable = {binding.name for binding in self._bindings if binding.is_partial_buf_allowed}
        pairs = retained(self.inputs, self.outputs)
        self._twins = {name: twin for name, twin in pairs.items() if {name, twin} <= skippable}
        self._reset = False

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run one inference: setData, enqueue, waitForCompletion, getData.

        Raises:
            RunError: names, dtypes or shapes do not fit, or the runtime reports a failure.
        """
        if self._execobj is None:
            raise RunError("this session is closed")
        check_feeds(feeds, self.inputs, optional=tuple(self._twins))
        feeds = {**self._forgotten(feeds), **feeds}
        shapes = self._combination(feeds)
        wanted = wanted_outputs(self.outputs, fetch)
        arrays = {spec.name: undefined(shapes[spec.name], spec.dtype) for spec in self.outputs}
        # what is left out is skipped: the card reads its own copy, and keeps what it does not hand out (§4.4)
        arrays.update({name: _SKIPPED for name in self._twins if name not in feeds})
        arrays.update({name: _SKIPPED for name in self._twins.values() if name not in wanted})
        arrays.update({name: np.ascontiguousarray(a, a.dtype.newbyteorder("=")) for name, a in feeds.items()})
        order = [binding.name for binding in self._bindings]
        buffers = [self._rt.QBuffer(arrays[name].tobytes()) for name in order]
        dims = self._rt.BufferDimensionsVecRef(
            [(arrays[name].itemsize, list(arrays[name].shape) or [1]) for name in order]
        )
        self._runs += 1
        call, when = self._call, f" in run {self._runs}"
        call.ok("setData", self._execobj.setData, buffers, dims, when=when)
        call.ok("enqueue", self._queue.enqueue, self._execobj, when=when)
        call.ok("waitForCompletion", self._execobj.waitForCompletion, when=when)
        data = call.value("getData", self._execobj.getData, when=when)
        if len(data) != len(order):
            raise RunError(f"getData returned {len(data)} buffers for {len(order)} bindings")
        self._reset = False
        places = {name: index for index, name in enumerate(order)}
        return {name: _read(name, data[places[name]], arrays[name]) for name in wanted}

    def reset(self) -> None:
        """Forget retained state: a card cannot, so the next run uploads an undefined content."""
        self._reset = bool(self._twins)

    def _forgotten(self, feeds: Tensors) -> dict[str, Array]:
        if not self._reset:
            return {}
        state = {spec.name: spec for spec in self.inputs if spec.name in self._twins and spec.name not in feeds}
        shapes = self._combination(feeds)
        return {name: undefined(shapes[name], spec.dtype) for name, spec in state.items()}

    def start(self, execobj: Any) -> None:
        """Take the execution object; nobody else may hold it."""
        self._execobj = execobj

    def close(self) -> None:
        """Drop the execution object."""
        self._execobj = None

    def _combination(self, feeds: Tensors) -> Shapes:
        for shapes in self.shapes:
            if all(array.shape == shapes[name] for name, array in feeds.items()):
                return shapes
        given = {name: list(array.shape) for name, array in feeds.items()}
        allowed = "\n".join(f"  { ({name: list(shapes[name]) for name in feeds}) }" for shapes in self.shapes)
        raise RunError(f"no specialization has the input shapes {given}; the QPC allows\n{allowed}")


def _dtype(binding: Any) -> str:
    if binding.type not in DTYPES:
        raise RunError(f"binding {binding.name!r} has data type number {binding.type}, which this adapter cannot read")
    return DTYPES[binding.type]


def _symbolic(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int | str, ...]:
    """Return the dims that all combinations share, and a symbol for each dim that varies."""
    if len({len(shape) for shape in shapes}) != 1:
        raise RunError(f"binding {name!r} has different ranks in the allowed shapes: {list(shapes)}")
    columns = list(zip(*shapes, strict=True))
    return tuple(sizes[0] if len(set(sizes)) == 1 else f"{name}.{axis}" for axis, sizes in enumerate(columns))


def _read(name: str, buffer: Any, like: Array) -> Array:
    raw = bytes(buffer)
    if len(raw) != like.nbytes:
        raise RunError(f"output {name!r} came back with {len(raw)} bytes, wanted {like.nbytes} for {list(like.shape)}")
    array: Array = np.frombuffer(raw, dtype=like.dtype).reshape(like.shape).copy()
    return array
