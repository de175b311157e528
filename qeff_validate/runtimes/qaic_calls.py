# SPDX-License-Identifier: Apache-2.0
"""Calls of the ``qaicrt`` bindings whose errors name the failed step, the state of the cards and a remedy.

Failure texts and remedies: card-contract §8. This module imports nothing of ``qaicrt``; the runtime passes it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qeff_validate.artifact import Artifact
from qeff_validate.errors import RunError
from qeff_validate.runtimes.qaic_cards import required_resources

T = TypeVar("T")

REMEDIES = {
    "Context": "qaic-util -q lists the cards that exist; without --device-ids the one with most free cores is taken",
    "Qpc": "it must be the directory that holds a whole programqpc.bin, made by the compiler of this SDK: one that was"
    " cut short, or that comes from another SDK or for another card, must be compiled again",
    "load QS_UNSUPPORTED": "the QPC is for another generation of cards: compile it with the aic_hw_version of this one",
    "load": "each card must be Ready (qaic-util -q; qaic-util -s resets one), of the hardware version that the QPC was"
    " compiled for, and as many must be named by --device-ids as it was compiled for",
    "activate": "the card has too few free cores or too little memory for this QPC: see 'Nsp Free' and 'Dram Free' in"
    " qaic-util -q, stop other programs, or compile with fewer num_cores",
    "deactivate": "the card may be held until this process ends: 'Nsp Free' in qaic-util -q tells",
    "waitForCompletion QS_TIMEDOUT": "the card did not answer within the data path time-out: if qaic-util -q shows it"
    " Ready and the network is that slow, raise the limits in /sys/module/qaic/parameters; else reset it with"
    " qaic-util -s",
    "waitForCompletion QS_DEV_ERROR": "the card was lost: qaic-util -q shows its state, the kernel log why;"
    " qaic-util -s resets it, then run again",
    "waitForCompletion QS_DATA_CRC_ERROR": "data were damaged on their way to or from the card: run again; if it comes"
    " back, look for PCIe errors in the kernel log and at how the card is seated",
    "waitForCompletion": "dims that match no specialization end up here: the runtime's own log says which;"
    " qaic-util -q shows the card's state",
}
"""Remedies by step and status, else by step."""


@dataclass(frozen=True, slots=True)
class CheckedCalls:
    """Raises a RunError where a constructor of the bindings raises or a method returns another status than success.

    Attributes:
        rt: the module ``qaicrt``.
        artifact: the QPC.
        qids: ids of the cards.
    """

    rt: Any
    artifact: Artifact
    qids: tuple[int, ...]

    def construct(self, name: str, constructor: Callable[[], T]) -> T:
        """Construct an object of the bindings.

        Args:
            name: of its class, for the error.
            constructor: takes no arguments.

        Raises:
            RunError: the constructor raised.
        """
        try:
            return constructor()
        except Exception as exc:  # which type the extension raises is not documented (§11, question 1)
            raise RunError(f"qaicrt.{name} failed for {self}: {exc}{_remedy(name)}") from exc

    def call(self, name: str, method: Callable[..., Any], *args: Any, when: str = "", resources: bool = False) -> None:
        """Call a method that returns a status.

        Args:
            name: of the method, for the error.
            method: a bound method of the bindings.
            args: its arguments.
            when: appended to the name in the error, such as `` in run 3``.
            resources: the error lists what the QPC needs and what the cards have free.

        Raises:
            RunError: the method raised, or its status is not QS_SUCCESS.
        """
        status, problem = self._status(method, args)
        del method, args  # a traceback that references an ExecObj would keep its card reserved
        self._check(name, status, problem, when, resources=resources)

    def value(self, name: str, method: Callable[..., Any], *args: Any, when: str = "") -> Any:
        """Call a method that returns a status and a value, and return the value; arguments as those of `call`.

        Raises:
            RunError: the method raised, or its status is not QS_SUCCESS.
        """
        result, problem = self._status(method, args)
        del method, args
        self._check(name, problem or result[0], problem, when)
        return result[1]

    def _status(self, method: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, str]:
        """Return the result of a call, and the text of the exception that it raised instead, if any."""
        try:
            return method(*args), ""
        except Exception as exc:
            return None, str(exc) or type(exc).__name__

    def _check(self, name: str, status: Any, problem: str, when: str, *, resources: bool = False) -> None:
        if problem:
            raise RunError(f"{name} failed{when} for {self}: {problem}{_remedy(name)}")
        if status == self.rt.QStatus.QS_SUCCESS:
            return
        status_name, details = getattr(status, "name", str(status)), ""
        if resources:
            details = f": {required_resources(self.artifact)}, {', '.join(map(self._card_state, self.qids))}"
        raise RunError(f"{name} failed with {status_name}{when} for {self}{details}{_remedy(name, status_name)}")

    def _card_state(self, qid: int) -> str:
        """Describe the state and the free resources of a card, as far as it reports them."""
        try:
            _, info = self.rt.Util().getDeviceInfo(qid)
            text = f"card {qid} is {info.devStatus.name.removeprefix('QDS_').capitalize()}"
            free = info.devData and info.devData.resourceInfo
            if free:
                text += f" with {free.nspFree} of {free.nspTotal} cores and {free.dramFree} of {free.dramTotal} MB free"
        except Exception:  # this is part of an error message and must not raise another error
            return f"card {qid} gives no information"
        return text

    def __str__(self) -> str:
        return f"{self.artifact.path} on card{'s'[: len(self.qids) - 1]} {', '.join(map(str, self.qids))}"


def _remedy(name: str, status: str = "") -> str:
    text = REMEDIES.get(f"{name} {status}") or REMEDIES.get(name)
    return f"; {text}" if text else ""
