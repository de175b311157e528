# SPDX-License-Identifier: Apache-2.0
"""Faults on request, so that a client's handling of them can be tested without a card that fails.

They come from the environment variable QAIC_SIM_FAULT and from the file that QAIC_SIM_FAULT_FILE names, both read at
each use, so a fault can be switched on and off while a program runs. Faults are separated by commas or white space;
each is `name`, `name=value`, `name@k` or `name=value@k`::

    timeout@3 device-error=1 missing-property=dataPathTimeoutMs

The value is the QID of the only card that has the fault (`missing-property`: the attribute's name). `@k` is for
inferences: the k-th one since its activation has the fault, and no other.
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
    """One fault that is asked for."""

    name: str
    value: str = ""
    nth: int | None = None

    def concerns(self, qids: Collection[int]) -> bool:
        """Tells whether one of these cards has it."""
        return not self.value or int(self.value) in qids


def current() -> list[Fault]:
    """Returns the faults that are asked for now.

    Raises:
        RuntimeError: One of them is not known or not well formed.
    """
    text = os.environ.get("QAIC_SIM_FAULT", "")
    if file := os.environ.get("QAIC_SIM_FAULT_FILE"):
        with suppress(FileNotFoundError):  # taken away: no faults
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
    """Tells whether this fault is asked for, for one of these cards, whatever the inference."""
    return any(fault.name == name and fault.concerns(qids) for fault in current())


def in_inference(qids: Collection[int], number: int) -> Fault | None:
    """Returns the fault of the `number`-th inference of an activation on these cards."""
    for fault in current():
        if fault.name in _INFERENCES and fault.concerns(qids) and fault.nth in (None, number):
            return fault
    return None


def missing_properties() -> set[str]:
    """Returns the attributes that program properties lack."""
    return {fault.value for fault in current() if fault.name == "missing-property"}


def crash() -> None:
    """Ends the process as a fault in native code does, without a core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.raise_signal(signal.SIGSEGV)
    os._exit(128 + signal.SIGSEGV)  # somebody handles the signal
