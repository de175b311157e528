# SPDX-License-Identifier: Apache-2.0
"""`qaicrt.Qpc`: a compiled program and the description of its buffers (card-contract §2.2, §3)."""

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
    """One binding of a program.

    Attributes:
        name: of the input or output.
        is_input: True for an input.
        dtype: of the client's buffer.
        dims: the largest allowed shape.
        partial: a client may skip the buffer or fill a part of it.
        encoding: ``bfloat16`` (float32 in the network), ``mxint8`` (compressed when a client writes it), or empty.
    """

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    dims: Dims
    partial: bool
    encoding: str = ""

    @property
    def network_dtype(self) -> np.dtype[Any]:
        """The dtype in the network."""
        return np.dtype(np.float32) if self.encoding == "bfloat16" else self.dtype

    def decoded(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Convert a client's values to the values that the network reads."""
        if self.encoding == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        if self.encoding == "mxint8":
            return microscaling.mxint8(values.astype(np.float32)).astype(values.dtype)
        return values

    def encoded(self, result: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Convert an output of the network to the values that a client reads."""
        return (result.view(np.uint32) >> 16).astype(np.uint16) if self.encoding == "bfloat16" else result

    @property
    def size(self) -> int:
        """Size in bytes of the largest shape."""
        return int(self.dtype.itemsize * math.prod(self.dims))


def _mapping_type(kind: int) -> BufferDataTypeEnum:
    """Return the type in a buffer mapping, INVAL for bfloat16, which has no name there (card-contract §2.1)."""
    known = kind in BufferDataTypeEnum.__members__.values()
    return BufferDataTypeEnum(kind) if known else BufferDataTypeEnum.INVAL


class Qpc:
    """A compiled program.

    Args:
        directory: the directory with programqpc.bin, as str.

    Raises:
        TypeError: the directory is no str.
        RuntimeError: the QPC cannot be read, or its parts contradict each other.
    """

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
        """Return the serialized IoDesc."""
        return QStatus.QS_SUCCESS, QBuffer(self.program.io_desc)

    def getBufferMappings(self) -> list[BufferMapping]:
        """Return one mapping per binding, in the order of the bindings."""
        return [
            BufferMapping(
                bufferName=b.name,
                index=b.index,
                ioType=BufferIoTypeEnum(b.dir + 1),
                size=b.size,
                isPartialBufferAllowed=b.is_partial_buf_allowed,
                dataType=_mapping_type(b.type),
            )
            for b in self._wire
        ]

    def memory_mb(self) -> int:
        """Return the MB that an activation takes on each card: the file, mostly weights, and one set of buffers."""
        shared = set(self.retained.values())  # a retained output shares the memory of its input
        size = self.program.path.stat().st_size + sum(b.size for b in self.bindings if b.name not in shared)
        return -(-size // (2**20 * self.program.num_devices))
