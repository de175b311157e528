# SPDX-License-Identifier: Apache-2.0
"""Cloud AI 100 through ``qaicrt``: one runtime class for a card (``ai100``) and for the simulated SDK (``sim``).

The call sequence and its failure texts are those of card-contract §2.5, §4 and §8. Unlike shipping clients, it checks
the status of ``activate``, names, dtypes (a card sees only item size and dims) and shapes before the call, and whether
an output was written at all (buffers are initialized to NaN).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.protocols import Capabilities, Session, Settings
from qeff_validate.runtimes.qaic_calls import CheckedCalls
from qeff_validate.runtimes.qaic_cards import exclusive_cards, select_cards
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
"""Data path time-out of shipping clients (card-contract §2.4)."""

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
"""By the numbers of card-contract §3.1, as the generated protobuf module may lack the newest names."""

_SKIPPED: Array = np.empty(0, dtype=np.uint8)
"""No bytes and dims [0] skip a binding (card-contract §4.4)."""


class QaicRuntime:
    """Opens ``qpc`` artifacts with the runtime bindings of an SDK.

    Args:
        name: ``ai100`` or ``sim``.
        sdk: provides the bindings and the compiler.
        settings: ids of the cards to use.
    """

    kind: Kind = "qpc"

    def __init__(self, name: str, sdk: Sdk, settings: Settings | None = None) -> None:
        self.name = name
        self.sdk = sdk
        self.settings = settings or Settings()

    @property
    def capabilities(self) -> Capabilities:
        """The precision is the case's, and the SDK declares whether it is simulated."""
        return Capabilities(compute=None, simulated=self.sdk.simulated, sdk=self.sdk)

    def probe(self) -> str | None:
        """Return None if a QPC can be run here, else the reason and a remedy."""
        return self.sdk.why_not()

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Load and activate a QPC for the duration of the session.

        Raises:
            ConfigError: the settings name another number of cards than the QPC was compiled for.
            Unavailable: there is no SDK or no card, or the bindings are simulated and the runtime is ``ai100``.
            RunError: the bindings refuse the QPC, the card or the activation, or fail to release them.
        """
        rt, aicapi = self.sdk.bindings()
        if getattr(rt, "SIMULATED", False) != self.sdk.built_in:
            raise Unavailable(f"{rt.__file__} says that it is simulated, and {self.name} means a real card: use sim")
        qids = select_cards(artifact, self.settings.device_ids, self.sdk)
        with ExitStack() as locks:
            if not self.sdk.built_in:
                locks.enter_context(exclusive_cards(qids))
            with self._active(rt, aicapi, qids, artifact) as session:
                yield session

    @contextmanager
    def _active(self, rt: Any, aicapi: Any, qids: tuple[int, ...], artifact: Artifact) -> Iterator[Session]:
        calls = CheckedCalls(rt, artifact, qids)
        context = calls.construct("Context", lambda: rt.Context(rt.QIDList(list(qids))))
        queue = calls.construct("Queue", lambda: rt.Queue(context, qids[0]))
        qpc = calls.construct("Qpc", lambda: rt.Qpc(str(artifact.path)))
        data = bytes(calls.value("getIoDescriptor", qpc.getIoDescriptor))
        io_desc = calls.construct("Qpc", lambda: aicapi.IoDesc.FromString(data))
        session = QaicSession(rt, calls, queue, io_desc)  # may raise, so before a card is reserved
        properties = _properties(rt, qids)
        qid = qids[0] if len(qids) == 1 else None
        program = calls.construct("Program", lambda: rt.Program(context, qid, qpc, properties))
        release_steps: list[tuple[str, Any]] = []
        try:
            calls.call("load", program.load, resources=True)
            release_steps.append(("unload", program.unload))
            calls.call("activate", program.activate, resources=True)
            release_steps.append(("deactivate", program.deactivate))
            session.start(calls.construct("ExecObj", lambda: rt.ExecObj(context, program)))
            yield session
        except BaseException:
            _release(calls, session, release_steps)  # its errors matter less than the first one
            raise
        error = _release(calls, session, release_steps)
        if error is not None:
            raise error


def ai100(settings: Settings) -> QaicRuntime:
    """Return the runtime for a card, with the installed SDK."""
    return QaicRuntime("ai100", installed(settings.sdk), settings)


def sim(settings: Settings) -> QaicRuntime:
    """Return the runtime for the simulated SDK."""
    return QaicRuntime("sim", simulated(), settings)


def _properties(rt: Any, qids: Sequence[int]) -> Any:
    properties = rt.QAicProgramProperties()
    # the attributes differ between SDK versions, and setting an unknown one raises (card-contract §2.4)
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


def _release(calls: CheckedCalls, session: QaicSession, steps: Sequence[tuple[str, Any]]) -> RunError | None:
    """Run every release step, last first, and return the first error."""
    session.close()  # the ExecObj must be deleted before deactivate (card-contract §2.5)
    errors = []
    for name, method in reversed(steps):
        try:
            calls.call(name, method)
        except RunError as exc:
            errors.append(exc)
    return errors[0] if errors else None


class QaicSession:
    """An active program with one execution object, from `start` to `close`.

    Args:
        rt: the module ``qaicrt``.
        calls: checks the calls of the bindings.
        queue: of the first card.
        io_desc: ``IoDesc`` of the QPC (card-contract §3).

    Raises:
        RunError: the description is inconsistent, or has a data type that this runtime cannot read.
    """

    def __init__(self, rt: Any, calls: CheckedCalls, queue: Any, io_desc: Any) -> None:
        self._rt, self._calls, self._queue = rt, calls, queue
        self._execobj: Any = None
        self._runs = 0
        self._bindings = sorted(io_desc.selected_set.bindings, key=lambda binding: binding.index)
        names = [binding.name for binding in self._bindings]
        dtypes = [_dtype(binding) for binding in self._bindings]
        combinations = [[tuple(shape.dims) for shape in allowed.shapes] for allowed in io_desc.allowed_shapes]
        combinations = combinations or [[tuple(binding.dims) for binding in self._bindings]]
        if len(set(names)) != len(names) or any(len(dims) != len(names) for dims in combinations):
            raise RunError(
                f"{calls}: its description has {len(names)} bindings, and names or shapes that do not fit them"
            )
        if any(dim < 0 for shapes in combinations for dims in shapes for dim in dims):
            raise RunError(f"{calls}: its description has negative dims")
        self.shapes: tuple[Shapes, ...] = tuple(dict(zip(names, dims, strict=True)) for dims in combinations)
        specs = [
            TensorSpec(name, dtype, _symbolic(name, [shapes[name] for shapes in self.shapes]))
            for name, dtype in zip(names, dtypes, strict=True)
        ]
        inputs = {binding.name for binding in self._bindings if binding.dir == 0}
        self.inputs: tuple[TensorSpec, ...] = tuple(spec for spec in specs if spec.name in inputs)
        self.outputs: tuple[TensorSpec, ...] = tuple(spec for spec in specs if spec.name not in inputs)
        skippable = {binding.name for binding in self._bindings if binding.is_partial_buf_allowed}
        pairs = retained(self.inputs, self.outputs)
        self._twins = {name: twin for name, twin in pairs.items() if {name, twin} <= skippable}
        self._reset_pending = False

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run one inference: setData, enqueue, waitForCompletion, getData.

        Raises:
            RunError: names, dtypes or shapes do not fit, or the runtime reports a failure.
        """
        if self._execobj is None:
            raise RunError("this session is closed")
        check_feeds(feeds, self.inputs, optional=tuple(self._twins))
        feeds = {**self._undefined_state(feeds), **feeds}
        shapes = self._combination(feeds)
        wanted = wanted_outputs(self.outputs, fetch)
        arrays = {spec.name: undefined(shapes[spec.name], spec.dtype) for spec in self.outputs}
        # a skipped input is read from the card's own copy, a skipped output stays on the card (card-contract §4.4)
        arrays.update({name: _SKIPPED for name in self._twins if name not in feeds})
        arrays.update({name: _SKIPPED for name in self._twins.values() if name not in wanted})
        arrays.update({name: np.ascontiguousarray(a, a.dtype.newbyteorder("=")) for name, a in feeds.items()})
        order = [binding.name for binding in self._bindings]
        buffers = [self._rt.QBuffer(arrays[name].tobytes()) for name in order]
        dims = self._rt.BufferDimensionsVecRef(
            [(arrays[name].itemsize, list(arrays[name].shape) or [1]) for name in order]
        )
        self._runs += 1
        calls, when = self._calls, f" in run {self._runs}"
        calls.call("setData", self._execobj.setData, buffers, dims, when=when)
        calls.call("enqueue", self._queue.enqueue, self._execobj, when=when)
        calls.call("waitForCompletion", self._execobj.waitForCompletion, when=when)
        data = calls.value("getData", self._execobj.getData, when=when)
        if len(data) != len(order):
            raise RunError(f"getData returned {len(data)} buffers for {len(order)} bindings")
        self._reset_pending = False
        index = {name: position for position, name in enumerate(order)}
        return {name: _array(name, data[index[name]], arrays[name]) for name in wanted}

    def reset(self) -> None:
        """Forget retained state: the next run uploads undefined content, as a card has no such call."""
        self._reset_pending = bool(self._twins)

    def _undefined_state(self, feeds: Tensors) -> dict[str, Array]:
        """Return undefined content for each state that is not fed, in the first run after a reset."""
        if not self._reset_pending:
            return {}
        state = {spec.name: spec for spec in self.inputs if spec.name in self._twins and spec.name not in feeds}
        shapes = self._combination(feeds)
        return {name: undefined(shapes[name], spec.dtype) for name, spec in state.items()}

    def start(self, execobj: Any) -> None:
        """Take the execution object; there may be no other reference to it."""
        self._execobj = execobj

    def close(self) -> None:
        """Delete the execution object."""
        self._execobj = None

    def _combination(self, feeds: Tensors) -> Shapes:
        """Return the first specialization with the shapes of the feeds."""
        for shapes in self.shapes:
            if all(array.shape == shapes[name] for name, array in feeds.items()):
                return shapes
        fed = {name: list(array.shape) for name, array in feeds.items()}
        allowed = "\n".join(f"  { ({name: list(shapes[name]) for name in feeds}) }" for shapes in self.shapes)
        raise RunError(f"no specialization has the input shapes {fed}; the QPC allows\n{allowed}")


def _dtype(binding: Any) -> str:
    if binding.type not in DTYPES:
        raise RunError(f"binding {binding.name!r} has data type number {binding.type}, which this runtime cannot read")
    return DTYPES[binding.type]


def _symbolic(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int | str, ...]:
    """Return a shape with the sizes that all combinations share, and a symbol for each dim that varies."""
    if len({len(shape) for shape in shapes}) != 1:
        raise RunError(f"binding {name!r} has different ranks in the allowed shapes: {list(shapes)}")
    columns = list(zip(*shapes, strict=True))
    return tuple(sizes[0] if len(set(sizes)) == 1 else f"{name}.{axis}" for axis, sizes in enumerate(columns))


def _array(name: str, buffer: Any, like: Array) -> Array:
    """Return a copy of an output buffer, with dtype and shape of another array."""
    raw = bytes(buffer)
    if len(raw) != like.nbytes:
        raise RunError(f"output {name!r} came back with {len(raw)} bytes, wanted {like.nbytes} for {list(like.shape)}")
    array: Array = np.frombuffer(raw, dtype=like.dtype).reshape(like.shape).copy()
    return array
