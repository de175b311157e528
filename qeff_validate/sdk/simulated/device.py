# SPDX-License-Identifier: Apache-2.0
"""The simulated cards: their number, their state, and their free resources within this process.

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
    """Return the generation of the cards: ai100, or the value of QAIC_SIM_CARD.

    Raises:
        RuntimeError: QAIC_SIM_CARD has another value than ai100 or ai200.
    """
    name = os.environ.get("QAIC_SIM_CARD", "ai100")
    if name not in HW_MAJOR:
        raise RuntimeError(f"QAIC_SIM_CARD is {' or '.join(HW_MAJOR)}, not {name!r}")
    return name


class NotEnough(Exception):
    """The card has too few NSPs or too little memory left; the text has both numbers."""


@dataclass(slots=True)
class Card:
    """One simulated card and its free resources.

    Attributes:
        qid: id of the card.
        nsp_free: NSPs (neural signal processors) without an active program.
        dram_free_mb: free memory in MB.
        networks_active: number of active programs.
        lost: the card was lost by a requested fault.
    """

    qid: int
    nsp_free: int = NSP_TOTAL
    dram_free_mb: int = DRAM_TOTAL_MB
    networks_active: int = 0
    lost: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def vc_free(self) -> int:
        """Free virtual channels: each activation takes one."""
        return VC_TOTAL - self.networks_active

    @property
    def status(self) -> str:
        """Initializing, Ready or Error; a lost card is in Error until the fault is no longer requested."""
        self.lost = self.lost and faults.active("device-lost", self.qid)
        if self.lost or faults.active("device-error", self.qid):
            return ERROR
        return INITIALIZING if faults.active("device-initializing", self.qid) else READY

    def free(self) -> tuple[int, int]:
        """Return the free NSPs and the free memory in MB; zero while the corresponding fault is requested."""
        nsps = 0 if faults.active("activate-nsp", self.qid) else self.nsp_free
        return nsps, 0 if faults.active("activate-dram", self.qid) else self.dram_free_mb

    def reserve(self, nsps: int, dram_mb: int) -> None:
        """Reserve NSPs and memory for one activation.

        Raises:
            NotEnough: too few are free; nothing is reserved.
        """
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
        """Release the resources of an activation."""
        with self._lock:
            self.nsp_free += nsps
            self.dram_free_mb += dram_mb
            self.networks_active -= 1


_cards: dict[int, Card] = {}
_cards_lock = threading.Lock()


def device_ids() -> list[int]:
    """Return the ids of all cards, 0 to QAIC_SIM_DEVICES - 1.

    Raises:
        RuntimeError: QAIC_SIM_DEVICES is no number.
    """
    text = os.environ.get("QAIC_SIM_DEVICES", "1")
    if not text.isdecimal():
        raise RuntimeError(f"QAIC_SIM_DEVICES must be a count of devices such as 4, not {text!r}")
    return [] if faults.active("no-devices") else list(range(int(text)))


def card(qid: int) -> Card:
    """Return the card with this id, always the same object.

    Raises:
        RuntimeError: there is no such card.
    """
    if qid not in device_ids():
        raise RuntimeError(f"Device {qid} does not exist; there are {device_ids()}")
    with _cards_lock:
        return _cards.setdefault(qid, Card(qid))
