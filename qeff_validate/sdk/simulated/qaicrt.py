# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaicrt`: the Python runtime API of the Cloud AI 100 SDK (card-contract §2, §4).

Constructors raise; methods return a QStatus or a tuple that starts with one. What goes wrong is also said on
stderr. There is no card: see the package.
"""

from __future__ import annotations

from ._description import Qpc
from ._execution import ExecObj, QAicQueueProperties, Queue
from ._program import Context, Program, QAicProgramProperties
from ._sets import InferenceHandle, InferenceSet, InferenceVector
from ._util import Util
from ._values import (
    BufferDataTypeEnum,
    BufferDimensionsVecRef,
    BufferIoTypeEnum,
    BufferMapping,
    QBuffer,
    QDevStatus,
    QIDList,
    QLogLevel,
    QProgramState,
    QStatus,
)

SIMULATED = True

__all__ = [
    "SIMULATED",
    "BufferDataTypeEnum",
    "BufferDimensionsVecRef",
    "BufferIoTypeEnum",
    "BufferMapping",
    "Context",
    "ExecObj",
    "InferenceHandle",
    "InferenceSet",
    "InferenceVector",
    "Program",
    "QAicProgramProperties",
    "QAicQueueProperties",
    "QBuffer",
    "QDevStatus",
    "QIDList",
    "QLogLevel",
    "QProgramState",
    "QStatus",
    "Qpc",
    "Queue",
    "Util",
]
