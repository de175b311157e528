# SPDX-License-Identifier: Apache-2.0
"""Qpc of the `qaicrt` API: a compiled program and what it says of its buffers (card-contract §2.2, §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from .. import qpc
from ..errors import QpcError
from ..graph import Dims
from ..numerics import microscaling
from ..qpc_checks import description_problem, network_problem
from . import QAicApi_pb2 as aicapi
from .api_types import BufferDataTypeEnum, BufferIoTypeEnum, BufferMapping, QBuffer, QStatus

_DTYPES: dict[int, np.dtype[Any]] = {
    aicapi.FLOAT_TYPE: np.dtype(np.float32),
    aicapi.FLOAT_16_TYPE: np.dtype(np.float16),
    aicapi.BFLOAT16_TYPE: np.dtype(np.uint16),
    aicapi.INT8_Q_TYPE: np.dtype(np.int8),
    aicapi.INT8_TYPE: np.dtype(np.int8),
    aicapi.UINT8_Q_TYPE: np.dtype(np.uint8),
    aicapi.INT32_I_TYPE: np.dtype(np.int32),
    aicapi.INT64_I_TYPE: np.dtype(np.int64),
}


@dataclass(frozen=True, slots=True)
class Binding:
    """What an inference needs to know of one binding.

    `encoding` is bfloat16, which is float32 in the network, mxint8, which is compressed when a client writes it, or
    empty.
    """

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    dims: Dims
    partial: bool
    encoding: str = ""

    @property
    def held(self) -> np.dtype[Any]:
        """The type in the network."""
        return np.dtype(np.float32) if self.encoding == "bfloat16" else self.dtype

    def decoded(self, given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns what the network reads of what a client wrote."""
        if self.encoding == "bfloat16":
            return (given.astype(np.uint32) << 16).view(np.float32)
        if self.encoding == "mxint8":
            return microscaling.mxint8(given.astype(np.float32)).astype(given.dtype)
        return given

    def encoded(self, result: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns what a client reads of what the network wrote."""
        return (result.view(np.uint32) >> 16).astype(np.uint16) if self.encoding == "bfloat16" else result

    @property
    def size(self) -> int:
        """Size in bytes of the largest shape."""
        return int(self.dtype.itemsize * math.prod(self.dims))


def _mapped(kind: int) -> BufferDataTypeEnum:
    """Returns the type of a buffer mapping, which has no name for bfloat16 (card-contract §2.1)."""
    known = kind in BufferDataTypeEnum.__members__.values()
    return BufferDataTypeEnum(kind) if known else BufferDataTypeEnum.INVAL


class Qpc:
    """A compiled program, given by the directory that holds programqpc.bin, as str."""

    def __init__(self, directory: str) -> None:
        if not isinstance(directory, str):
            raise TypeError(f"Qpc(): incompatible constructor arguments: {type(directory).__name__}")
        try:
            self.program = qpc.read(Path(directory))
            desc = aicapi.IoDesc.FromString(self.program.io_desc)
            network = onnx.load_from_string(self.program.network)
        except (QpcError, ValueError, DecodeError) as error:
            raise RuntimeError(f"Failed to create Qpc: {error}") from error
        problem = description_problem(desc, self.program.header, _DTYPES) or network_problem(network, qpc.FILE_NAME)
        if problem:
            raise RuntimeError(f"Failed to create Qpc: {self.program.path} is truncated or corrupt: {problem}")
        self._wire = list(desc.selected_set.bindings)
        compressed = dict.fromkeys(self.program.header.get("mxint8", []), "mxint8")
        self.bindings = tuple(
            Binding(
                name=b.name,
                is_input=b.dir == aicapi.BUFFER_IO_TYPE_INPUT,
                dtype=_DTYPES[b.type],
                dims=tuple(b.dims),
                partial=b.is_partial_buf_allowed,
                encoding="bfloat16" if b.type == aicapi.BFLOAT16_TYPE else compressed.get(b.name, ""),
            )
            for b in self._wire
        )
        self.allowed: tuple[tuple[Dims, ...], ...] = tuple(
            tuple(tuple(shape.dims) for shape in entry.shapes) for entry in desc.allowed_shapes
        )
        self.retained: dict[str, str] = dict(self.program.header.get("retained", {}))

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
                dataType=_mapped(b.type),
            )
            for b in self._wire
        ]

    def memory_mb(self) -> int:
        """Returns what an activation takes of one card: the file, mostly weights, and one set of buffers."""
        shared = set(self.retained.values())  # a retained output lives in its input's memory
        size = self.program.path.stat().st_size + sum(b.size for b in self.bindings if b.name not in shared)
        return -(-size // (2**20 * self.program.num_devices))
