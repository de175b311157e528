# SPDX-License-Identifier: Apache-2.0
"""Faults on request, to test a client's error handling without a card that fails.

They are read from the environment variable QAIC_SIM_FAULT and from the file that QAIC_SIM_FAULT_FILE names, at each
use, so a fault can be switched on and off while a program runs. Faults are separated by commas or white space;
each is `name`, `name=value`, `name@k` or `name=value@k`::

    timeout@3 device-error=1 missing-property=dataPathTimeoutMs

The value is the id of the only card with the fault (`missing-property`: the attribute's name). `@k` restricts a fault
of inferences to the k-th one since the activation.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CARDS = ("no-devices", "device-error", "device-initializing", "activate-nsp", "activate-dram")
_INFERENCES = ("timeout", "device-lost", "crc", "crash")
NAMES = (*_CARDS, *_INFERENCES, "missing-property")


@dataclass(frozen=True, slots=True)
class Fault:
    """A requested fault.

    Attributes:
        name: one of `NAMES`.
        value: id of the only card with the fault, or the attribute; empty: all cards.
        nth: number of the only inference with the fault; None: all.
    """

    name: str
    value: str = ""
    nth: int | None = None

    def concerns(self, qids: Collection[int]) -> bool:
        """Return True if one of these cards has the fault."""
        return not self.value or int(self.value) in qids


def current() -> list[Fault]:
    """Return the faults that are requested now.

    Raises:
        RuntimeError: a fault is unknown or malformed.
    """
    text = os.environ.get("QAIC_SIM_FAULT", "")
    if file := os.environ.get("QAIC_SIM_FAULT_FILE"):
        with suppress(FileNotFoundError):  # no file: no faults
            text += f" {Path(file).read_text(encoding='utf-8')}"
    return [_parse(entry) for entry in re.split(r"[\s,]+", text) if entry]


def _parse(entry: str) -> Fault:
    match = re.fullmatch(r"([a-z-]+)(?:=(\w+))?(?:@([1-9]\d*))?", entry)
    name, value, nth = match.groups() if match else ("", None, None)
    if name not in NAMES:
        raise RuntimeError(f"QAIC_SIM_FAULT: unknown fault '{entry}'; the faults are {', '.join(NAMES)}")
    if nth and name not in _INFERENCES:
        raise RuntimeError(f"QAIC_SIM_FAULT: '{entry}': @k is for {', '.join(_INFERENCES)} only")
    if name == "missing-property":
        if not value:
            raise RuntimeError(f"QAIC_SIM_FAULT: '{entry}' needs an attribute: missing-property=<attribute>")
    elif value and (name == "no-devices" or not value.isdecimal()):
        raise RuntimeError(f"QAIC_SIM_FAULT: '{entry}': the value is the QID of one card")
    return Fault(name, value or "", int(nth) if nth else None)


def active(name: str, *qids: int) -> bool:
    """Return True if this fault is requested for one of these cards, whatever the inference."""
    return any(fault.name == name and fault.concerns(qids) for fault in current())


def in_inference(qids: Collection[int], number: int) -> Fault | None:
    """Return the fault of the `number`-th inference of an activation on these cards."""
    for fault in current():
        if fault.name in _INFERENCES and fault.concerns(qids) and fault.nth in (None, number):
            return fault
    return None


def missing_properties() -> set[str]:
    """Return the attributes that program properties lack by a requested fault."""
    return {fault.value for fault in current() if fault.name == "missing-property"}


def crash() -> None:
    """End the process by SIGSEGV, as a bug in native code does, without a core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.raise_signal(signal.SIGSEGV)
    os._exit(128 + signal.SIGSEGV)  # a handler has caught the signal
