# SPDX-License-Identifier: Apache-2.0
"""One inference: choice of the specialization, inputs, outputs (card-contract §4.3, §4.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ..graph import Dims
from .activation import Activation
from .api_types import QStatus, log
from .qpc_description import Binding

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """The client's buffer for one binding.

    Attributes:
        memory: the client's own memory as uint8, not a copy.
        itemsize: bytes per element, as the client stated it.
        dims: as the client stated them.
        start: the position of the block in the state, for a slice of retained state; None otherwise.
    """

    memory: Array
    itemsize: int
    dims: Dims
    start: Dims | None = None

    @property
    def skipped(self) -> bool:
        """True if no data are transferred."""
        return self.dims == (0,)

    def block(self) -> tuple[slice, ...] | None:
        """Return the indices of a slice of retained state; None for a whole or partial buffer."""
        if self.start is None:
            return None
        return tuple(slice(begin, begin + size) for begin, size in zip(self.start, self.dims, strict=True))


SKIPPED = Slot(np.empty(0, np.uint8), 8, (0,))


def rank1(dims: Sequence[int]) -> Dims:
    """Return the dims of a buffer: (1,) for a scalar."""
    return tuple(dims) or (1,)


def is_prefix(dims: Dims, whole: Dims) -> bool:
    """Return True if a buffer of `dims` is a prefix of the memory of a buffer of dims `whole`.

    It is if only one dim differs and all dims before it are 1.
    """
    if len(dims) != len(whole):
        return False
    axis = next((axis for axis, (a, b) in enumerate(zip(dims, whole, strict=True)) if a != b), len(dims))
    return dims[axis + 1 :] == whole[axis + 1 :] and math.prod(dims[:axis]) == 1 and dims[axis] < whole[axis]


@dataclass(frozen=True, slots=True)
class Inference:
    """One inference. It has no reference to its ExecObj, so `del execobj` deletes that at once.

    Attributes:
        activation: the active program.
        slots: one per binding.
    """

    activation: Activation
    slots: Sequence[Slot]

    def run(self) -> QStatus:
        """Run, store the state, and write the outputs into the client's memory; a failure is logged with its reason."""
        try:
            with self.activation.lock:
                return self._run()
        except Exception as error:  # the real binding returns a status as well
            log(f"QAIC_ERROR_EXECOBJ_RUNTIME Error running program: {error}")
            return QStatus.QS_ERROR

    def _run(self) -> QStatus:
        if (status := self.activation.begin()) != QStatus.QS_SUCCESS:
            return status
        shapes = self._shapes()
        if shapes is None:
            return QStatus.QS_INVAL
        parts = list(zip(self.activation.bindings, self.slots, shapes, strict=True))
        feeds = {b.name: self._feed(b, slot, dims) for b, slot, dims in parts if b.is_input}
        wanted = [(b, slot) for b, slot, _ in parts if not b.is_input and not slot.skipped]
        outputs = self.activation.run(feeds, [binding.name for binding, _ in wanted])
        for binding, _, dims in parts:
            value = outputs.get(binding.name)
            if value is not None and rank1(value.shape()) != rank1(dims):
                log(f"Output {binding.name} is {list(value.shape())}, not {list(dims)}")
                return QStatus.QS_ERROR
        for binding, slot in wanted:
            _receive(binding, slot, outputs[binding.name].numpy())
        self.activation.retain(outputs)
        return QStatus.QS_SUCCESS

    def _feed(self, binding: Binding, slot: Slot, dims: Dims) -> ort.OrtValue:
        """Return the value of an input: the client's memory, the retained state, or the one written into the other."""
        if slot.skipped:
            return self.activation.state(binding, dims)
        values = binding.decoded(slot.memory.view(binding.dtype).reshape(slot.dims))
        if slot.start is None and rank1(slot.dims) == rank1(dims):
            return ort.OrtValue.ortvalue_from_numpy(values.reshape(dims))
        whole = np.array(self.activation.state(binding, dims).numpy())
        block = slot.block()
        if block is None:
            whole.reshape(-1)[: values.size] = values.reshape(-1)
        else:
            whole[block] = values
        return ort.OrtValue.ortvalue_from_numpy(whole)

    def _shapes(self) -> Sequence[Dims] | None:
        """Return the specialization that matches the buffers, or log why there is none (§4.3)."""
        bindings, allowed = self.activation.bindings, self.activation.allowed
        for binding, slot in zip(bindings, self.slots, strict=True):
            if slot.skipped and binding.is_input and binding.name not in self.activation.retained:
                log(f"Partial buffer not allowed for: {binding.name}: it is skipped, but it is not retained state")
                return None
        matching: list[Sequence[Dims]] = []
        for partial in (False, True):
            matching = matching or [
                entry
                for entry in allowed
                if all(_fits(*part, partial=partial) for part in zip(bindings, self.slots, entry, strict=True))
            ]
        if len(matching) == 1:
            return matching[0]
        passed = {b.name: list(slot.dims) for b, slot in zip(bindings, self.slots, strict=True)}
        why = "more than one specialization fits" if matching else f"allowed {[list(map(list, e)) for e in allowed]}"
        log(f"No matching dimension found: passed {passed}, {why}")
        return None


def _fits(binding: Binding, slot: Slot, dims: Dims, *, partial: bool) -> bool:
    """Return True if a buffer fits the dims of a specialization, or, if `partial`, the beginning of its memory."""
    if slot.skipped:
        return True
    if slot.itemsize != binding.dtype.itemsize:
        return False
    if slot.start is not None:
        ends = [begin + size for begin, size in zip(slot.start, slot.dims, strict=True)]
        return len(ends) == len(dims) and all(end <= size for end, size in zip(ends, dims, strict=True))
    return rank1(slot.dims) == rank1(dims) or (partial and binding.partial and is_prefix(slot.dims, dims))


def _receive(binding: Binding, slot: Slot, result: Array) -> None:
    """Write an output into the client's memory."""
    block = slot.block()
    source = (result if block is None else result[block]).reshape(-1)
    target = slot.memory.view(binding.dtype)
    target[...] = binding.encoded(source[: target.size])
