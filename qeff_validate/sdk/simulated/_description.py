# SPDX-License-Identifier: Apache-2.0
"""Qpc of the `qaicrt` API: a compiled program and what it says of its buffers (qaic-contract §2.2, §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import QAicApi_pb2 as aicapi
from . import qpc
from ._values import BufferDataTypeEnum, BufferIoTypeEnum, BufferMapping, QBuffer, QStatus
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


@dataclass(frozen=True, slots=True)
class Binding:
    """What an inference needs to know of one binding."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    dims: Dims
    partial: bool

    @property
    def size(self) -> int:
        """Size in bytes of the largest shape."""
        return int(self.dtype.itemsize * math.prod(self.dims))


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
            Binding(
                b.name, b.dir == aicapi.BUFFER_IO_TYPE_INPUT, _DTYPES[b.type], tuple(b.dims), b.is_partial_buf_allowed
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
                dataType=BufferDataTypeEnum(b.type),
            )
            for b in self._wire
        ]

    def memory_mb(self) -> int:
        """Returns what an activation takes of one card: the file, mostly weights, and one set of buffers."""
        shared = set(self.retained.values())  # a retained output lives in its input's memory
        size = self.program.path.stat().st_size + sum(b.size for b in self.bindings if b.name not in shared)
        return -(-size // (2**20 * self.program.num_devices))
