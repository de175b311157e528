# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaicrt`: the Python runtime API of the Cloud AI 100 SDK (card-contract §2, §4).

Constructors raise; methods return a QStatus or a tuple that starts with one, and log the reason of a failure to stderr.
There is no card: see the package `simulated`.
"""

from __future__ import annotations

from .api_types import (
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
from .device_queries import Util
from .execution import ExecObj, QAicQueueProperties, Queue
from .inference_set import InferenceHandle, InferenceSet, InferenceVector
from .program import Context, Program, QAicProgramProperties
from .qpc_description import Qpc

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
