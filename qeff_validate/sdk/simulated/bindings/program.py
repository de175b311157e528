# SPDX-License-Identifier: Apache-2.0
"""`qaicrt.Context` and `qaicrt.Program`: a QPC on one or more cards (card-contract §2.4, §4.1, §4.7)."""

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
    """The cards of a client.

    Args:
        qids: ids of the cards; None: all.

    Raises:
        RuntimeError: a card does not exist, or there is none.
    """

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
        """Accept a log level; the simulator logs errors at every level."""
        return QStatus.QS_SUCCESS if isinstance(level, QLogLevel) else QStatus.QS_INVAL


class QAicProgramProperties:
    """Properties of a Program; setting an unknown attribute raises AttributeError (card-contract §2.4)."""

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
    """Return the attributes that this SDK lacks: by a requested fault, or because 1.22.0.119 was the last with them."""
    removed = {"SubmitRetryTimeoutMs"} if release() > (1, 22, 0, 119) else set()
    return faults.missing_properties() | removed


class Program:
    """A QPC on cards: load(), activate(), inferences, deactivate(), unload().

    Args:
        context: the cards of the client.
        qid: id of the card; None: those of `devMapping`, else the first cards that have enough resources.
        qpc: the compiled program.
        props: time-outs, `devMapping`, `selectMask`.

    Raises:
        RuntimeError: the card is not in the context.
    """

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
        """Check that the program fits its cards, and that they are ready; calling it again does nothing."""
        if self.state in _LOADED:
            return QStatus.QS_SUCCESS
        status, text = self._load_problem()
        if text:
            log(f"Failed to initialize program, {text}")
        self.state = QProgramState.LOAD_ERROR if text else QProgramState.LOADED
        return status

    def activate(self) -> QStatus:
        """Reserve NSPs and memory on the cards and open the network."""
        if self.activation is not None:
            return QStatus.QS_SUCCESS
        if self.state not in _LOADED:
            log("Failed to Activate program: it is not loaded")
            return QStatus.QS_INVAL
        self.state = QProgramState.ACTIVATE_ERROR
        resources = self.qpc.program.num_cores, self.qpc.memory_mb()
        cards = self._reserve(*resources)
        if not cards:
            log("Failed to Activate program")
            return QStatus.QS_DEV_ERROR
        try:
            self.activation = Activation(self.qpc, cards)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            _release(cards, *resources)
            log(f"Failed to Activate program: {error}")
            return QStatus.QS_ERROR
        # A program that is deleted without deactivate() must release its NSPs.
        self._release = weakref.finalize(self, _release, cards, *resources)
        self.state = QProgramState.FULLY_ACTIVATED
        # From here on only the client activates: an ExecObj after deactivate() is an error (§4.1).
        self.auto_activates = False
        return QStatus.QS_SUCCESS

    def deactivate(self) -> QStatus:
        """Release the cards; the retained state is lost. Refused while an ExecObj exists."""
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
        """Undo load(); refused while the program is active."""
        if self.activation is not None or self.state not in _LOADED:
            log(f"Failed to unload program: it is {'active' if self.activation else 'not loaded'}")
            return QStatus.QS_INVAL
        self.state = QProgramState.INIT
        return QStatus.QS_SUCCESS

    def createSlicingSpecHandle(self, spec: str) -> tuple[QStatus, SlicingSpec | None]:
        """Parse a slicing spec in JSON for `ExecObj.setDataWithSlices` (§4.8)."""
        try:
            return QStatus.QS_SUCCESS, SlicingSpec.parse(spec)
        except ValueError as error:
            log(f"createSlicingSpecHandle: {error}")
            return QStatus.QS_INVAL, None

    def _load_problem(self) -> tuple[QStatus, str]:
        """Return status and reason if the program cannot be loaded; QS_SUCCESS and an empty text if it can."""
        program, qids = self.qpc.program, self._candidates()
        card = device.generation()
        expected, actual = device.HW_MAJOR.get(program.hw_version), device.HW_MAJOR[card]
        if expected != actual:
            return QStatus.QS_UNSUPPORTED, (
                "HW Version incompatible, program expects:"
                f"Major Version {expected} ({program.hw_version}), device has {actual} ({card})"
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
        """Return the ids of the cards that may be used, in order; an invalid `devMapping` gives texts."""
        if self._qid is not None:
            return [self._qid]
        if not self._mapping:
            return self.context.qids
        return [int(qid) if qid.isdecimal() else qid for qid in self._mapping.split(":")]

    def _reserve(self, nsps: int, memory_mb: int) -> list[device.Card]:
        """Reserve as many cards as the program needs, the first that have enough free resources, or none."""
        reserved: list[device.Card] = []
        for qid in self._candidates():
            try:
                card = device.card(qid)
                if card.status != device.READY:
                    raise RuntimeError(f"device no in Ready state but {card.status}")
                card.reserve(nsps, memory_mb)
                reserved.append(card)
            except (device.NotEnough, RuntimeError) as error:
                log(f"Device {qid} activate failed: {error}")
                log(f"Dev {qid} activate failed status {int(QStatus.QS_DEV_ERROR)}")
            if len(reserved) == self.qpc.program.num_devices:
                return reserved
        _release(reserved, nsps, memory_mb)
        return []


def _is_ready(qid: int) -> bool:
    return qid in device.device_ids() and device.card(qid).status == device.READY


def _release(cards: Sequence[device.Card], nsps: int, memory_mb: int) -> None:
    for card in cards:
        card.release(nsps, memory_mb)
