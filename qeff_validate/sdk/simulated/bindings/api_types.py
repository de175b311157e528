# SPDX-License-Identifier: Apache-2.0
"""Enums, buffers and dims of the `qaicrt` API (card-contract §2.1, §2.3)."""

from __future__ import annotations

import enum
import operator
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


class QStatus(enum.IntEnum):
    """Status that methods return."""

    QS_SUCCESS = 0
    QS_PERM = 1
    QS_AGAIN = 2
    QS_NOMEM = 3
    QS_BUSY = 4
    QS_NODEV = 5
    QS_INVAL = 6
    QS_NOSPC = 7
    QS_BADFD = 8
    QS_TIMEDOUT = 9
    QS_PROTOCOL = 10
    QS_UNSUPPORTED = 11
    QS_DATA_CRC_ERROR = 12
    QS_DEV_ERROR = 300
    QS_ERROR = 500


class QLogLevel(enum.IntEnum):
    """Log level of a Context; the simulator logs errors only."""

    QL_DEBUG = 0
    QL_INFO = 1
    QL_WARN = 2
    QL_ERROR = 3


class QDevStatus(enum.IntEnum):
    """State of a card."""

    QDS_INITIALIZING = 0
    QDS_READY = 1
    QDS_ERROR = 2


class QProgramState(enum.IntEnum):
    """State of a Program."""

    INIT = 0
    LOADED = 1
    FULLY_ACTIVATED = 2
    ERROR = 100
    LOAD_ERROR = 101
    ACTIVATE_ERROR = 102


class BufferIoTypeEnum(enum.IntEnum):
    """Direction of a buffer mapping; the numbers differ from those of the protobuf's direction.

    Qualcomm's samples use the long names.
    """

    INVALID = 0
    INPUT = 1
    OUTPUT = 2
    BUFFER_IO_TYPE_INVALID = 0
    BUFFER_IO_TYPE_INPUT = 1
    BUFFER_IO_TYPE_OUTPUT = 2


class BufferDataTypeEnum(enum.IntEnum):
    """Data type of a buffer mapping; the same numbers as the protobuf's types up to INT8."""

    FLOAT = 0
    FLOAT16 = 1
    INT8Q = 2
    UINT8Q = 3
    INT16Q = 4
    INT32Q = 5
    INT32I = 6
    INT64I = 7
    INT8 = 8
    INVAL = 9


class QBuffer(bytearray):
    """Bytes of an input or output: a copy of the constructor's argument; outputs are written into it.

    It is a bytearray, so that `bytes(buffer)` and `np.frombuffer(buffer, …)` work on every Python version.
    """

    def __init__(self, data: bytes | np.ndarray[Any, Any]) -> None:
        if not isinstance(data, (bytes, bytearray, np.ndarray)):
            raise TypeError(f"QBuffer(): incompatible constructor arguments: {type(data).__name__}")
        super().__init__(data.tobytes() if isinstance(data, np.ndarray) else data)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self)


class QIDList(list[int]):
    """A list of device ids."""

    def __init__(self, qids: Iterable[int] = ()) -> None:
        super().__init__(operator.index(qid) for qid in qids)


class BufferDimensionsVecRef:
    """Per binding `(itemsize, dims)`, mutable by index; reading returns `(int, list[int])`."""

    def __init__(self, entries: Iterable[tuple[int, Iterable[int]]] = ()) -> None:
        self._entries = [self._entry(entry) for entry in entries]

    @staticmethod
    def _entry(value: tuple[int, Iterable[int]]) -> tuple[int, list[int]]:
        itemsize, dims = value
        return operator.index(itemsize), [operator.index(dim) for dim in dims]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[int, list[int]]:
        itemsize, dims = self._entries[operator.index(index)]
        return itemsize, list(dims)

    def __setitem__(self, index: int, value: tuple[int, Iterable[int]]) -> None:
        self._entries[operator.index(index)] = self._entry(value)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class BufferMapping:
    """One binding in the list of `Qpc.getBufferMappings`."""

    bufferName: str
    index: int
    ioType: BufferIoTypeEnum
    size: int
    isPartialBufferAllowed: bool
    dataType: BufferDataTypeEnum


def log(text: str) -> None:
    """Write an error line to stderr, where the real runtime logs."""
    sys.stderr.write(f"{text}\n")
