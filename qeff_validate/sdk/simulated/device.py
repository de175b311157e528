# SPDX-License-Identifier: Apache-2.0
"""The simulated cards: how many there are, their state, and what is free on each of them within this process.

One card by default; the environment variable QAIC_SIM_DEVICES sets another count, 0 included.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

from . import faults

NSP_TOTAL = 16
DRAM_TOTAL_MB = 32768
VC_TOTAL, PC_TOTAL, MCID_TOTAL, SEM_TOTAL = 16, 32, 128, 1024
FREQUENCIES_MHZ = {"NSP": 1450, "DDR": 2133, "COMPNOC": 1000, "MEMNOC": 1000, "SYSNOC": 1000}
HW_MAJOR = {"ai100": 2, "ai200": 3}
HW_VERSION = "2.0.0.0"
SKU_TYPE, SKU_NAME = 2, "PCIe"
INITIALIZING, READY, ERROR = "Initializing", "Ready", "Error"


def generation() -> str:
    """Returns what the simulated cards are: ai100, or what QAIC_SIM_CARD says."""
    found = os.environ.get("QAIC_SIM_CARD", "ai100")
    if found not in HW_MAJOR:
        raise RuntimeError(f"QAIC_SIM_CARD is {' or '.join(HW_MAJOR)}, not {found!r}")
    return found


class NotEnough(Exception):
    """The card has too few NSPs or too little memory left; the text has both numbers."""


@dataclass(slots=True)
class Card:
    """One simulated card and what its active programs occupy."""

    qid: int
    nsp_free: int = NSP_TOTAL
    dram_free_mb: int = DRAM_TOTAL_MB
    networks_active: int = 0
    lost: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def vc_free(self) -> int:
        """Virtual channels that are free: each activation has one."""
        return VC_TOTAL - self.networks_active

    @property
    def status(self) -> str:
        """Initializing, Ready or Error; a lost card stays in Error until nobody asks for that fault any more."""
        self.lost = self.lost and faults.active("device-lost", self.qid)
        if self.lost or faults.active("device-error", self.qid):
            return ERROR
        return INITIALIZING if faults.active("device-initializing", self.qid) else READY

    def free(self) -> tuple[int, int]:
        """NSPs and MB of memory that are free; none while that fault is asked for."""
        nsps = 0 if faults.active("activate-nsp", self.qid) else self.nsp_free
        return nsps, 0 if faults.active("activate-dram", self.qid) else self.dram_free_mb

    def reserve(self, nsps: int, dram_mb: int) -> None:
        """Takes NSPs and memory for one activation, or raises NotEnough and takes nothing."""
        with self._lock:
            nsp_free, dram_free = self.free()
            if nsps > nsp_free:
                raise NotEnough(
                    f"Memory resource exhausted: {nsps} NSPs are needed, {nsp_free} of {NSP_TOTAL} are free"
                )
            if dram_mb > dram_free:
                raise NotEnough(
                    f"Memory resource exhausted: {dram_mb} MB are needed, {dram_free} of {DRAM_TOTAL_MB} MB are free"
                )
            if not self.vc_free:
                raise NotEnough(f"Memory resource exhausted: a virtual channel is needed, 0 of {VC_TOTAL} are free")
            self.nsp_free -= nsps
            self.dram_free_mb -= dram_mb
            self.networks_active += 1

    def release(self, nsps: int, dram_mb: int) -> None:
        """Gives back what `reserve` took."""
        with self._lock:
            self.nsp_free += nsps
            self.dram_free_mb += dram_mb
            self.networks_active -= 1


_cards: dict[int, Card] = {}
_cards_lock = threading.Lock()


def device_ids() -> list[int]:
    """Returns the QIDs that exist, 0 to QAIC_SIM_DEVICES - 1."""
    text = os.environ.get("QAIC_SIM_DEVICES", "1")
    if not text.isdecimal():
        raise RuntimeError(f"QAIC_SIM_DEVICES must be a count of devices such as 4, not {text!r}")
    return [] if faults.active("no-devices") else list(range(int(text)))


def card(qid: int) -> Card:
    """Returns the card with this QID, the same object for the life of the process."""
    if qid not in device_ids():
        raise RuntimeError(f"Device {qid} does not exist; there are {device_ids()}")
    with _cards_lock:
        return _cards.setdefault(qid, Card(qid))
