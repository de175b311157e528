# SPDX-License-Identifier: Apache-2.0
"""An active program: its network, its retained state, and its share of the cards (card-contract §4.5)."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from .. import faults, qpc
from ..device import READY, Card
from ..graph import Dims
from .api_types import QStatus, log
from .qpc_description import Binding, Qpc

_FAILURES = {
    "timeout": (QStatus.QS_TIMEDOUT, "failed to receive response from NW: Connection timed out"),
    "device-lost": (QStatus.QS_DEV_ERROR, "device lost: finish failed status 300"),
    "crc": (QStatus.QS_DATA_CRC_ERROR, "data CRC error"),
}


def undefined(dims: Dims, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return state before the first write: NaN or the lowest integer, or zeros if QAIC_SIM_STATE=lenient.

    Raises:
        RuntimeError: QAIC_SIM_STATE has another value than strict or lenient.
    """
    mode = os.environ.get("QAIC_SIM_STATE", "strict")
    if mode not in ("strict", "lenient"):
        raise RuntimeError(f"QAIC_SIM_STATE is strict or lenient, not {mode!r}")
    if mode == "lenient":
        return np.zeros(dims, dtype)
    return np.full(dims, np.nan if dtype.kind == "f" else np.iinfo(dtype).min, dtype)


class Activation:
    """The open network, its retained state, and its share of the cards. It has no reference to its Program.

    State is stored as OrtValues, so the output of one inference becomes the input of the next without a copy, and a
    state that the network writes into keeps its memory, as on a card.

    Args:
        source: the QPC.
        cards: the cards whose cores and memory are reserved for it.
    """

    def __init__(self, source: Qpc, cards: Sequence[Card]) -> None:
        self.bindings, self.retained = source.bindings, source.retained
        self.allowed = source.allowed or (tuple(binding.dims for binding in source.bindings),)
        # There is one network on the card, so inferences of several queues run one after the other.
        self.lock = threading.Lock()
        self._in_place: Sequence[str] = source.program.header.get("in_place", ())
        self._session = qpc.open_session(source.program)
        self._cards = cards
        self._state: dict[str, ort.OrtValue] = {}
        self._inferences = 0
        self._lost = False

    def begin(self) -> QStatus:
        """Count an inference, and return a failure status if a fault is requested or a card was lost."""
        self._inferences += 1
        qids = [card.qid for card in self._cards]
        fault = faults.in_inference(qids, self._inferences)
        if fault and fault.name == "crash":
            faults.crash()
        if fault and fault.name == "device-lost":
            for card in self._cards:
                card.lost = True
        self._lost = self._lost or any(card.status != READY for card in self._cards)
        name = "device-lost" if self._lost else fault.name if fault else ""
        status, text = _FAILURES.get(name, (QStatus.QS_SUCCESS, ""))
        if text:
            log(f"{text} (device {':'.join(map(str, qids))})")
        return status

    def state(self, binding: Binding, dims: Dims) -> ort.OrtValue:
        """Return the retained value of an input; undefined content if there is none with these dims."""
        value = self._state.get(binding.name)
        if value is not None and tuple(value.shape()) == dims:
            return value
        return ort.OrtValue.ortvalue_from_numpy(undefined(dims, binding.network_dtype))

    def run(self, feeds: Mapping[str, ort.OrtValue], names: Sequence[str]) -> dict[str, ort.OrtValue]:
        """Run the network.

        Args:
            feeds: every input.
            names: of the outputs to return; those that are retained are returned as well.
        """
        io = self._session.io_binding()
        for name, value in feeds.items():
            io.bind_ortvalue_input(name, value)
        outputs = [*dict.fromkeys([*names, *self.retained.values()])]
        # what the last inference left is nobody else's memory
        kept = {self.retained[name]: feeds[name] for name in self._in_place if feeds[name] is self._state.get(name)}
        for name in outputs or [next(b.name for b in self.bindings if not b.is_input)]:
            if name in kept:
                io.bind_ortvalue_output(name, kept[name])
            else:
                io.bind_output(name, "cpu")
        self._session.run_with_iobinding(io)
        return {**dict(zip(outputs, io.get_outputs(), strict=False)), **kept}

    def retain(self, outputs: Mapping[str, ort.OrtValue]) -> None:
        """Store each output X_RetainedState as the state of X."""
        self._state = {name: outputs[twin] for name, twin in self.retained.items()}
