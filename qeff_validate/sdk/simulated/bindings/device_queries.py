# SPDX-License-Identifier: Apache-2.0
"""`qaicrt.Util`: queries about cards and versions (card-contract §2.7)."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .. import device
from ..release import base_version
from .api_types import QDevStatus, QIDList, QStatus

_STATUS = {
    device.INITIALIZING: QDevStatus.QDS_INITIALIZING,
    device.READY: QDevStatus.QDS_READY,
    device.ERROR: QDevStatus.QDS_ERROR,
}
_locks: dict[int, IO[Any]] = {}
_locks_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class ResourceInfo:
    """Total and free resources of a card: memory in MB, NSPs, channels, multicast ids, semaphores."""

    dramTotal: int
    dramFree: int
    nspTotal: int
    nspFree: int
    vcTotal: int
    vcFree: int
    mcidTotal: int
    mcidFree: int
    semTotal: int
    semFree: int
    pcTotal: int
    pcFree: int
    skuType: int


@dataclass(frozen=True, slots=True)
class PerformanceInfo:
    """Clocks of a card in MHz; those of the simulated one never change."""

    nspFrequencyMhz: int
    ddrFrequencyMhz: int
    compnocFrequencyMhz: int
    memnocFrequencyMhz: int
    sysnocFrequencyMhz: int


@dataclass(frozen=True, slots=True)
class DeviceData:
    """The part of the device info that the card itself reports."""

    resourceInfo: ResourceInfo


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The device info of a card; `devData` is None unless the card is ready."""

    name: str
    devStatus: QDevStatus
    pciInfo: str
    devData: DeviceData | None


class Util:
    """Queries about cards and versions: QS_NODEV if a card does not exist, QS_DEV_ERROR if it is not ready."""

    def getDeviceIds(self) -> tuple[QStatus, QIDList]:
        """Return the ids of all cards."""
        return QStatus.QS_SUCCESS, QIDList(device.device_ids())

    def getDeviceInfo(self, qid: int) -> tuple[QStatus, DeviceInfo | None]:
        """Return the device info of a card."""
        if qid not in device.device_ids():
            return QStatus.QS_NODEV, None
        _, resources = self.getResourceInfo(qid)
        data = None if resources is None else DeviceData(resources)
        status = _STATUS[device.card(qid).status]
        return QStatus.QS_SUCCESS, DeviceInfo(f"Simulated AI 100 {qid}", status, "none (simulated)", data)

    def getResourceInfo(self, qid: int) -> tuple[QStatus, ResourceInfo | None]:
        """Return total and free resources of a card."""
        if (status := _usable(qid)) != QStatus.QS_SUCCESS:
            return status, None
        card = device.card(qid)
        nsp_free, dram_free = card.free()
        return QStatus.QS_SUCCESS, ResourceInfo(
            dramTotal=device.DRAM_TOTAL_MB,
            dramFree=dram_free,
            nspTotal=device.NSP_TOTAL,
            nspFree=nsp_free,
            vcTotal=device.VC_TOTAL,
            vcFree=card.vc_free,
            mcidTotal=device.MCID_TOTAL,
            mcidFree=device.MCID_TOTAL,
            semTotal=device.SEM_TOTAL,
            semFree=device.SEM_TOTAL,
            pcTotal=device.PC_TOTAL,
            pcFree=device.PC_TOTAL,
            skuType=device.SKU_TYPE,
        )

    def getPerformanceInfo(self, qid: int) -> tuple[QStatus, PerformanceInfo | None]:
        """Return the clocks of a card."""
        if (status := _usable(qid)) != QStatus.QS_SUCCESS:
            return status, None
        return QStatus.QS_SUCCESS, PerformanceInfo(*device.FREQUENCIES_MHZ.values())

    def getAicVersion(self) -> tuple[QStatus, int, int, str, str]:
        """Return status, major and minor version, the rest as text, and the variant ``simulated``."""
        major, minor, patch = base_version().split(".", 2)
        return QStatus.QS_SUCCESS, int(major), int(minor), patch, "simulated"

    def checkLibraryVersion(self) -> QStatus:
        """Always succeeds: library and bindings are one."""
        return QStatus.QS_SUCCESS

    def lockDevice(self, qid: int, lock: bool, block: bool) -> QStatus:
        """Lock or unlock a card for this process; without QAIC_SERIALIZE_DEVICE=1 nothing is locked.

        Args:
            qid: id of the card.
            lock: True to lock, False to unlock; a second lock of the same process has no effect.
            block: wait for a lock of another process; otherwise return QS_BUSY.
        """
        if qid not in device.device_ids():
            return QStatus.QS_NODEV
        if os.environ.get("QAIC_SERIALIZE_DEVICE") != "1":
            return QStatus.QS_SUCCESS
        with _locks_lock:
            if not lock:
                file_lock = _locks.pop(qid, None)
                if file_lock is not None:
                    file_lock.close()
                return QStatus.QS_INVAL if file_lock is None else QStatus.QS_SUCCESS
            if qid in _locks:
                return QStatus.QS_SUCCESS
            file = (Path(tempfile.gettempdir()) / f"qaic-sim-{os.getuid()}-{qid}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
            except OSError:
                file.close()
                return QStatus.QS_BUSY
            _locks[qid] = file
        return QStatus.QS_SUCCESS


def _usable(qid: int) -> QStatus:
    if qid not in device.device_ids():
        return QStatus.QS_NODEV
    return QStatus.QS_SUCCESS if device.card(qid).status == device.READY else QStatus.QS_DEV_ERROR
