# SPDX-License-Identifier: Apache-2.0
"""Cloud AI 100 through ``qaicrt``: one adapter for a card (``ai100``) and for the simulated SDK (``sim``).

The call sequence, its order and its failure texts are those of qaic-contract §2.5, §4 and §8. What shipping clients
leave unchecked is checked here: the status of ``activate``, names, dtypes (a card sees only item size and dims) and
shapes before the call, and whether an output was written at all (buffers start out as NaN).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.protocols import Session, Settings
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
"""What shipping clients set as data path timeout (qaic-contract §2.4)."""

# qaic-contract §3.1, by number, because the generated module may lack the newest names
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
"""No bytes, dims [0]: how a binding is skipped (qaic-contract §4.4)."""

# what a failed step usually means and what to do (qaic-contract §8)
ADVICE = {
    "activate": "the card has too few free cores or too little memory for this QPC: see 'Nsp Free' and 'Dram Free' in"
    " qaic-util -q, stop other programs, or compile with fewer num_cores",
    "load": "the card must be Ready (qaic-util -q) and of the hardware version that the QPC was compiled for",
    "waitForCompletion": "dims that match no specialization, a time-out or a lost card end up here: the runtime's own"
    " log says which; qaic-util -q shows the card's state",
}


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
    def simulated(self) -> bool:
        """What the SDK says of itself."""
        return self.sdk.simulated

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
        device = self._device()
        call = _Calls(rt)
        with ExitStack() as held:
            if not self.sdk.built_in:
                held.enter_context(_card_lock(device))
            with self._active(rt, aicapi, call, device, artifact) as session:
                yield session

    @contextmanager
    def _active(self, rt: Any, aicapi: Any, call: _Calls, device: int, artifact: Artifact) -> Iterator[Session]:
        context = call.make("Context", lambda: rt.Context(rt.QIDList([device])))
        queue = call.make("Queue", lambda: rt.Queue(context, device))
        qpc = call.make("Qpc", lambda: rt.Qpc(str(artifact.path)))
        description = aicapi.IoDesc.FromString(bytes(call.value("getIoDescriptor", qpc.getIoDescriptor())))
        session = QaicSession(rt, call, queue, description)  # may refuse, so before the card is taken
        program = call.make("Program", lambda: rt.Program(context, device, qpc, _properties(rt)))
        try:
            call.ok("load", program.load())
            call.ok("activate", program.activate())
            session.start(call.make("ExecObj", lambda: rt.ExecObj(context, program)))
            yield session
        finally:
            session.close()  # the ExecObj must be gone before deactivate (§2.5)
            released = program.deactivate()
            program.unload()
        call.ok("deactivate", released)

    def _device(self) -> int:
        if self.settings.device_ids:
            return self.settings.device_ids[0]
        ready = [card for card in self.sdk.cards() if card.ready]
        if not ready:
            raise Unavailable(self.sdk.why_not() or "no card is Ready: see qaic-util -q")
        return max(ready, key=lambda card: card.free_cores).qid


def ai100(settings: Settings) -> QaicRuntime:
    """Return the runtime for a card, with the installed SDK."""
    return QaicRuntime("ai100", installed(settings.sdk), settings)


def sim(settings: Settings) -> QaicRuntime:
    """Return the runtime for the simulated SDK."""
    return QaicRuntime("sim", simulated(), settings)


@contextmanager
def _card_lock(device: int) -> Iterator[None]:
    """Hold a card for this process alone; others wait. The lock dies with its holder."""
    from filelock import FileLock

    with FileLock(Path(tempfile.gettempdir()) / f"qeff-validate-card-{device}.lock", mode=0o666):
        yield


def _properties(rt: Any) -> Any:
    properties = rt.QAicProgramProperties()
    # attributes come and go between SDK versions, and setting an unknown one raises (§2.4)
    if hasattr(properties, "dataPathTimeoutMs"):
        properties.dataPathTimeoutMs = TIMEOUT_MS
    return properties


@dataclass(frozen=True, slots=True)
class _Calls:
    """Translates constructors that raise and methods that return a status."""

    rt: Any

    def make(self, what: str, build: Any) -> Any:
        try:
            return build()
        except Exception as exc:  # which type the extension raises is not documented (§11, question 1)
            raise RunError(f"qaicrt.{what} failed: {exc}{_advice(what)}") from exc

    def ok(self, what: str, status: Any) -> None:
        if status != self.rt.QStatus.QS_SUCCESS:
            raise RunError(f"{what} failed with {getattr(status, 'name', status)}{_advice(what)}")

    def value(self, what: str, result: Any) -> Any:
        status, value = result
        self.ok(what, status)
        return value


def _advice(what: str) -> str:
    return f"; {ADVICE[what]}" if what in ADVICE else ""


class QaicSession:
    """An active program with one execution object, from `start` to `close`."""

    def __init__(self, rt: Any, call: _Calls, queue: Any, description: Any) -> None:
        self._rt, self._call, self._queue = rt, call, queue
        self._execobj: Any = None
        self.simulated = bool(getattr(rt, "SIMULATED", False))
        self._bindings = sorted(description.selected_set.bindings, key=lambda binding: binding.index)
        names = [binding.name for binding in self._bindings]
        dtypes = [_dtype(binding) for binding in self._bindings]
        combos = [[tuple(shape.dims) for shape in allowed.shapes] for allowed in description.allowed_shapes]
        combos = combos or [[tuple(binding.dims) for binding in self._bindings]]
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
        arrays.update({name: np.ascontiguousarray(array) for name, array in feeds.items()})
        order = [binding.name for binding in self._bindings]
        buffers = [self._rt.QBuffer(arrays[name].tobytes()) for name in order]
        dims = self._rt.BufferDimensionsVecRef(
            [(arrays[name].itemsize, list(arrays[name].shape) or [1]) for name in order]
        )
        call = self._call
        call.ok("setData", self._execobj.setData(buffers, dims))
        call.ok("enqueue", self._queue.enqueue(self._execobj))
        call.ok("waitForCompletion", self._execobj.waitForCompletion())
        data = call.value("getData", self._execobj.getData())
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
