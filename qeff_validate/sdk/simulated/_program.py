# SPDX-License-Identifier: Apache-2.0
"""Context, Qpc and Program of the `qaicrt` API: from a QPC to a card (qaic-contract §2.2, §4.1)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from . import QAicApi_pb2 as aicapi
from . import device, qpc
from ._values import (
    BufferDataTypeEnum,
    BufferIoTypeEnum,
    BufferMapping,
    QBuffer,
    QIDList,
    QLogLevel,
    QStatus,
    log,
)
from .boundary import Dims
from .errors import QpcError

_DTYPES: dict[int, np.dtype[Any]] = {
    aicapi.FLOAT_TYPE: np.dtype(np.float32),
    aicapi.FLOAT_16_TYPE: np.dtype(np.float16),
    aicapi.INT8_TYPE: np.dtype(np.int8),
    aicapi.UINT8_Q_TYPE: np.dtype(np.uint8),
    aicapi.INT32_I_TYPE: np.dtype(np.int32),
    aicapi.INT64_I_TYPE: np.dtype(np.int64),
}
_AUTO_LOAD_ACTIVATE = 0x04


@dataclass(frozen=True, slots=True)
class Binding:
    """What an inference needs to know of one binding."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    dims: Dims


class Context:
    """The cards that a client works with; all that exist if none are named."""

    def __init__(self, qids: QIDList | None = None) -> None:
        if qids is not None and not isinstance(qids, QIDList):
            raise TypeError("Context(): incompatible constructor arguments: a QIDList is needed")
        existing = device.device_ids()
        self.qids = list(existing if qids is None else qids)
        if missing := [qid for qid in self.qids if qid not in existing]:
            raise RuntimeError(f"Failed to create Context: no device {missing}; devices are {existing}")
        if not self.qids:
            raise RuntimeError("Failed to create Context: no devices")

    def setLogLevel(self, level: QLogLevel) -> QStatus:
        """Accepts a log level; the simulator logs errors at every level."""
        return QStatus.QS_SUCCESS if isinstance(level, QLogLevel) else QStatus.QS_INVAL


class Qpc:
    """A compiled program, given by the directory that holds programqpc.bin, as str."""

    def __init__(self, directory: str) -> None:
        if not isinstance(directory, str):
            raise TypeError(f"Qpc(): incompatible constructor arguments: {type(directory).__name__}")
        try:
            self.program = qpc.read(Path(directory))
            desc = aicapi.IoDesc.FromString(self.program.io_desc)
        except (QpcError, ValueError) as error:
            raise RuntimeError(f"Failed to create Qpc: {error}") from error
        self._wire = list(desc.selected_set.bindings)
        self.bindings = tuple(
            Binding(b.name, b.dir == aicapi.BUFFER_IO_TYPE_INPUT, _DTYPES[b.type], tuple(b.dims)) for b in self._wire
        )
        self.allowed: tuple[tuple[Dims, ...], ...] = tuple(
            tuple(tuple(shape.dims) for shape in entry.shapes) for entry in desc.allowed_shapes
        )

    def getIoDescriptor(self) -> tuple[QStatus, QBuffer]:
        """Returns the serialized IoDesc."""
        return QStatus.QS_SUCCESS, QBuffer(self.program.io_desc)

    def getBufferMappings(self) -> list[BufferMapping]:
        """Returns one mapping per binding, in binding order."""
        return [
            BufferMapping(
                bufferName=b.name,
                index=b.index,
                ioType=BufferIoTypeEnum(b.dir + 1),
                size=b.size,
                isPartialBufferAllowed=b.is_partial_buf_allowed,
                dataType=BufferDataTypeEnum(b.type),
            )
            for b in self._wire
        ]


class QAicProgramProperties:
    """Properties of a Program; an unknown attribute raises AttributeError (qaic-contract §2.4)."""

    __slots__ = ("dataPathTimeoutMs", "devMapping", "selectMask", "submitNumRetries")

    def __init__(self) -> None:
        self.dataPathTimeoutMs = 0
        self.devMapping = ""
        self.selectMask = _AUTO_LOAD_ACTIVATE
        self.submitNumRetries = 5


class Program:
    """A QPC on its way to a card: created, load(), activate(), then inferences, deactivate(), unload()."""

    def __init__(self, context: Context, qid: int | None, qpc: Qpc, props: QAicProgramProperties) -> None:
        if qid is not None and qid not in context.qids:
            raise RuntimeError(f"Failed to create Program: device {qid} is not in the context {context.qids}")
        self.context, self.qpc = context, qpc
        self.auto_activates = bool(props.selectMask & _AUTO_LOAD_ACTIVATE)
        self.exec_objs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.session: ort.InferenceSession | None = None
        self._qid, self._mapping = qid, props.devMapping
        self._loaded = False
        self._release: Callable[[], Any] | None = None

    def load(self) -> QStatus:
        """Checks that the program fits the card's generation; may be repeated."""
        program = self.qpc.program
        needs, has = device.HW_MAJOR.get(program.hw_version), device.HW_MAJOR[device.CARD_GENERATION]
        if needs != has:
            log(
                "Failed to initialize program, HW Version incompatible, program expects:"
                f"Major Version {needs} ({program.hw_version}), device has {has} ({device.CARD_GENERATION})"
            )
            return QStatus.QS_UNSUPPORTED
        given = len(self._candidates())
        if given != program.num_devices and (self._mapping or program.num_devices > 1):
            log(f"Failed to initialize program, it needs {program.num_devices} devices, {given} are given")
            return QStatus.QS_INVAL
        self._loaded = True
        return QStatus.QS_SUCCESS

    def activate(self) -> QStatus:
        """Takes NSPs and memory on a card and makes the program ready to run."""
        if self.session is not None:
            return QStatus.QS_SUCCESS
        if not self._loaded:
            log("Failed to Activate program: it is not loaded")
            return QStatus.QS_INVAL
        nsps, memory = self.qpc.program.num_cores, self._memory_mb()
        reserved = self._reserve(nsps, memory)
        if reserved is None:
            return QStatus.QS_DEV_ERROR
        try:
            session = qpc.open_session(self.qpc.program)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            reserved.release(nsps, memory)
            log(f"Failed to Activate program: {error}")
            return QStatus.QS_ERROR
        # A program that is dropped without deactivate() must not keep its NSPs.
        self._release = weakref.finalize(self, reserved.release, nsps, memory)
        self.session = session
        # From now on only the client activates: an ExecObj after deactivate() is an error (§4.1).
        self.auto_activates = False
        return QStatus.QS_SUCCESS

    def deactivate(self) -> QStatus:
        """Frees the card; refused while an ExecObj is alive."""
        if self.session is None or self._release is None:
            log("Failed to deactivate program: it is not active")
            return QStatus.QS_INVAL
        if len(self.exec_objs):
            log("Cannot deactivate program, it has active ExecObj")
            return QStatus.QS_INVAL
        self.session = None
        self._release()
        return QStatus.QS_SUCCESS

    def unload(self) -> QStatus:
        """Undoes load(); refused while the program is active."""
        if self.session is not None or not self._loaded:
            log(f"Failed to unload program: it is {'active' if self._loaded else 'not loaded'}")
            return QStatus.QS_INVAL
        self._loaded = False
        return QStatus.QS_SUCCESS

    def _candidates(self) -> list[int]:
        if self._qid is not None:
            return [self._qid]
        return [int(qid) for qid in self._mapping.split(":")] if self._mapping else self.context.qids

    def _reserve(self, nsps: int, memory_mb: int) -> device.Card | None:
        """Takes the first card that has enough left."""
        for qid in self._candidates():
            try:
                card = device.card(qid)
                card.reserve(nsps, memory_mb)
                return card
            except (device.NotEnough, RuntimeError) as error:
                log(f"Device {qid} activate failed: Memory resource exhausted: {error}")
                log(f"Dev {qid} activate failed status {int(QStatus.QS_DEV_ERROR)}")
        log("Failed to Activate program")
        return None

    def _memory_mb(self) -> int:
        """The file, which is mostly weights, and one set of buffers."""
        size = self.qpc.program.path.stat().st_size
        size += sum(b.dtype.itemsize * math.prod(d or 1 for d in b.dims) for b in self.qpc.bindings)
        return -(-size // 2**20)
