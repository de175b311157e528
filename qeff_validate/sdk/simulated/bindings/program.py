# SPDX-License-Identifier: Apache-2.0
"""Context and Program of the `qaicrt` API: from a QPC to one or more cards (card-contract §2.4, §4.1, §4.7)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from .. import device, faults
from ..release import release
from .activation import Activation
from .api_types import QIDList, QLogLevel, QProgramState, QStatus, log
from .qpc_description import Qpc
from .state_slices import SlicingSpec

_AUTO_LOAD_ACTIVATE = 0x04
_LOADED = (QProgramState.LOADED, QProgramState.FULLY_ACTIVATED, QProgramState.ACTIVATE_ERROR)


class Context:
    """The cards that a client works with; all that exist if none are named."""

    def __init__(self, qids: QIDList | None = None) -> None:
        if qids is not None and not isinstance(qids, QIDList):
            raise TypeError("Context(): incompatible constructor arguments: a QIDList is needed")
        existing = device.device_ids()
        self.qids = list(existing if qids is None else qids)
        if missing := [qid for qid in self.qids if qid not in existing]:
            raise RuntimeError(f"Failed to create Context: no device {missing}; devices are {existing}")
        if not self.qids:
            raise RuntimeError("Failed to create Context: no devices")

    def setLogLevel(self, level: QLogLevel) -> QStatus:
        """Accepts a log level; the simulator logs errors at every level."""
        return QStatus.QS_SUCCESS if isinstance(level, QLogLevel) else QStatus.QS_INVAL


class QAicProgramProperties:
    """Properties of a Program; an unknown attribute raises AttributeError (card-contract §2.4)."""

    __slots__ = ("SubmitRetryTimeoutMs", "dataPathTimeoutMs", "devMapping", "selectMask", "submitNumRetries")

    def __init__(self) -> None:
        defaults = {
            "dataPathTimeoutMs": 0,
            "devMapping": "",
            "selectMask": _AUTO_LOAD_ACTIVATE,
            "submitNumRetries": 5,
            "SubmitRetryTimeoutMs": 0,
        }
        for name in defaults.keys() - _missing_properties():
            setattr(self, name, defaults[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _missing_properties():
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


def _missing_properties() -> set[str]:
    """The attributes that this SDK does not have: those taken away on request, and what ended with 1.22.0.119."""
    ended = {"SubmitRetryTimeoutMs"} if release() > (1, 22, 0, 119) else set()
    return faults.missing_properties() | ended


class Program:
    """A QPC on its way to the cards: created, load(), activate(), then inferences, deactivate(), unload()."""

    def __init__(self, context: Context, qid: int | None, qpc: Qpc, props: QAicProgramProperties) -> None:
        if qid is not None and qid not in context.qids:
            raise RuntimeError(f"Failed to create Program: device {qid} is not in the context {context.qids}")
        self.context, self.qpc = context, qpc
        self.auto_activates = bool(getattr(props, "selectMask", _AUTO_LOAD_ACTIVATE) & _AUTO_LOAD_ACTIVATE)
        self.exec_objs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.state = QProgramState.INIT
        self.activation: Activation | None = None
        self._qid, self._mapping = qid, str(getattr(props, "devMapping", ""))
        self._release: Callable[[], Any] | None = None

    def load(self) -> QStatus:
        """Checks that the program fits its cards, and that they are ready; may be repeated."""
        if self.state in _LOADED:
            return QStatus.QS_SUCCESS
        status, text = self._unfit()
        if text:
            log(f"Failed to initialize program, {text}")
        self.state = QProgramState.LOAD_ERROR if text else QProgramState.LOADED
        return status

    def activate(self) -> QStatus:
        """Takes NSPs and memory on the cards and makes the program ready to run."""
        if self.activation is not None:
            return QStatus.QS_SUCCESS
        if self.state not in _LOADED:
            log("Failed to Activate program: it is not loaded")
            return QStatus.QS_INVAL
        self.state = QProgramState.ACTIVATE_ERROR
        needs = self.qpc.program.num_cores, self.qpc.memory_mb()
        cards = self._reserve(*needs)
        if not cards:
            log("Failed to Activate program")
            return QStatus.QS_DEV_ERROR
        try:
            self.activation = Activation(self.qpc, cards)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            _release(cards, *needs)
            log(f"Failed to Activate program: {error}")
            return QStatus.QS_ERROR
        # A program that is dropped without deactivate() must not keep its NSPs.
        self._release = weakref.finalize(self, _release, cards, *needs)
        self.state = QProgramState.FULLY_ACTIVATED
        # From now on only the client activates: an ExecObj after deactivate() is an error (§4.1).
        self.auto_activates = False
        return QStatus.QS_SUCCESS

    def deactivate(self) -> QStatus:
        """Frees the cards, which lose the retained state; refused while an ExecObj is alive."""
        if self.activation is None or self._release is None:
            log("Failed to deactivate program: it is not active")
            return QStatus.QS_INVAL
        if len(self.exec_objs):
            log("Cannot deactivate program, it has active ExecObj")
            return QStatus.QS_INVAL
        self.activation = None
        self._release()
        self.state = QProgramState.LOADED
        return QStatus.QS_SUCCESS

    def unload(self) -> QStatus:
        """Undoes load(); refused while the program is active."""
        if self.activation is not None or self.state not in _LOADED:
            log(f"Failed to unload program: it is {'active' if self.activation else 'not loaded'}")
            return QStatus.QS_INVAL
        self.state = QProgramState.INIT
        return QStatus.QS_SUCCESS

    def createSlicingSpecHandle(self, spec: str) -> tuple[QStatus, SlicingSpec | None]:
        """Reads a slicing spec in JSON for `ExecObj.setDataWithSlices` (§4.8)."""
        try:
            return QStatus.QS_SUCCESS, SlicingSpec.parse(spec)
        except ValueError as error:
            log(f"createSlicingSpecHandle: {error}")
            return QStatus.QS_INVAL, None

    def _unfit(self) -> tuple[QStatus, str]:
        """Returns why the program can not be loaded, with its status; an empty text if it can."""
        program, qids = self.qpc.program, self._candidates()
        card = device.generation()
        needs, has = device.HW_MAJOR.get(program.hw_version), device.HW_MAJOR[card]
        if needs != has:
            return QStatus.QS_UNSUPPORTED, (
                "HW Version incompatible, program expects:"
                f"Major Version {needs} ({program.hw_version}), device has {has} ({card})"
            )
        if unknown := [qid for qid in qids if qid not in self.context.qids]:
            return QStatus.QS_INVAL, f"devMapping {self._mapping!r} has {unknown}, the context {self.context.qids}"
        if len(qids) != program.num_devices and (self._mapping or program.num_devices > 1):
            return QStatus.QS_INVAL, f"it needs {program.num_devices} devices, {len(qids)} are given"
        ready = [qid for qid in qids if _is_ready(qid)]
        if len(ready) < program.num_devices:
            return QStatus.QS_DEV_ERROR, f"device no in Ready state (QID {', '.join(map(str, qids))})"
        return QStatus.QS_SUCCESS, ""

    def _candidates(self) -> Sequence[Any]:
        if self._qid is not None:
            return [self._qid]
        if not self._mapping:
            return self.context.qids
        return [int(qid) if qid.isdecimal() else qid for qid in self._mapping.split(":")]

    def _reserve(self, nsps: int, memory_mb: int) -> list[device.Card]:
        """Takes all the cards that the program needs, the first that have enough left, or none."""
        taken: list[device.Card] = []
        for qid in self._candidates():
            try:
                card = device.card(qid)
                if card.status != device.READY:
                    raise RuntimeError(f"device no in Ready state but {card.status}")
                card.reserve(nsps, memory_mb)
                taken.append(card)
            except (device.NotEnough, RuntimeError) as error:
                log(f"Device {qid} activate failed: {error}")
                log(f"Dev {qid} activate failed status {int(QStatus.QS_DEV_ERROR)}")
            if len(taken) == self.qpc.program.num_devices:
                return taken
        _release(taken, nsps, memory_mb)
        return []


def _is_ready(qid: int) -> bool:
    return qid in device.device_ids() and device.card(qid).status == device.READY


def _release(cards: Sequence[device.Card], nsps: int, memory_mb: int) -> None:
    for card in cards:
        card.release(nsps, memory_mb)
