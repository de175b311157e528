# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaicrt`: the Python runtime API of the Cloud AI 100 SDK (qaic-contract §2, §4).

Constructors raise; methods return a QStatus or a tuple that starts with one. What goes wrong is also said on
stderr. There is no card: see the package.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import device
from ._execution import ExecObj, QAicQueueProperties, Queue
from ._program import Context, Program, QAicProgramProperties, Qpc
from ._values import (
    BufferDataTypeEnum,
    BufferDimensionsVecRef,
    BufferIoTypeEnum,
    BufferMapping,
    QBuffer,
    QDevStatus,
    QIDList,
    QLogLevel,
    QStatus,
)
from .release import base_version

SIMULATED = True

__all__ = [
    "SIMULATED",
    "BufferDataTypeEnum",
    "BufferDimensionsVecRef",
    "BufferIoTypeEnum",
    "BufferMapping",
    "Context",
    "ExecObj",
    "Program",
    "QAicProgramProperties",
    "QAicQueueProperties",
    "QBuffer",
    "QDevStatus",
    "QIDList",
    "QLogLevel",
    "QStatus",
    "Qpc",
    "Queue",
    "Util",
]


@dataclass(frozen=True, slots=True)
class ResourceInfo:
    """What a card has and what is free, memory in MB."""

    dramTotal: int
    dramFree: int
    nspTotal: int
    nspFree: int
    skuType: int


@dataclass(frozen=True, slots=True)
class DeviceData:
    """The part of the device info that a card reports itself."""

    resourceInfo: ResourceInfo


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What is known of a card."""

    name: str
    devStatus: QDevStatus
    pciInfo: str
    devData: DeviceData


class Util:
    """Queries about cards and versions (qaic-contract §2.7)."""

    def getDeviceIds(self) -> tuple[QStatus, QIDList]:
        """Returns the ids of all cards."""
        return QStatus.QS_SUCCESS, QIDList(device.device_ids())

    def getDeviceInfo(self, qid: int) -> tuple[QStatus, DeviceInfo | None]:
        """Returns what is known of a card, or QS_NODEV."""
        status, resources = self.getResourceInfo(qid)
        if resources is None:
            return status, None
        name, data = f"Simulated AI 100 {qid}", DeviceData(resources)
        return QStatus.QS_SUCCESS, DeviceInfo(name, QDevStatus.QDS_READY, "none (simulated)", data)

    def getResourceInfo(self, qid: int) -> tuple[QStatus, ResourceInfo | None]:
        """Returns total and free resources of a card, or QS_NODEV."""
        if qid not in device.device_ids():
            return QStatus.QS_NODEV, None
        card = device.card(qid)
        totals = device.DRAM_TOTAL_MB, card.dram_free_mb, device.NSP_TOTAL, card.nsp_free
        return QStatus.QS_SUCCESS, ResourceInfo(*totals, skuType=device.SKU_TYPE)

    def getAicVersion(self) -> tuple[QStatus, int, int, str, str]:
        """Returns major, minor, the rest as text, and the variant, which says that this is a simulation."""
        major, minor, patch = base_version().split(".", 2)
        return QStatus.QS_SUCCESS, int(major), int(minor), patch, "simulated"

    def checkLibraryVersion(self) -> QStatus:
        """Always succeeds: library and bindings are one."""
        return QStatus.QS_SUCCESS
