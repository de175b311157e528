# SPDX-License-Identifier: Apache-2.0
"""`qaicrt.ExecObj` and `qaicrt.Queue`: one inference at a time per ExecObj, run by the Queue's thread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from ..graph import Dims
from .api_types import BufferDimensionsVecRef, QBuffer, QStatus, log
from .inference import SKIPPED, Inference, Slot, rank1
from .program import Context, Program
from .qpc_description import Binding
from .state_slices import SlicingSpec

Arrays = Sequence[tuple[int, np.ndarray[Any, Any]]]
_ids = itertools.count()


class ExecObj:
    """One set of buffers for one activated program; it must be deleted before the program is deactivated.

    Raises:
        RuntimeError: the program is not active and cannot be activated, or belongs to another context.
    """

    def __init__(self, context: Context, program: Program) -> None:
        if program.activation is None:
            if not program.auto_activates:
                raise RuntimeError("Cannot Init ExecObj, program is not active (not activated)")
            if program.load() != QStatus.QS_SUCCESS or program.activate() != QStatus.QS_SUCCESS:
                raise RuntimeError("QAIC_ERROR_EXECOBJ_RUNTIME Failed to create ExecObj: Error activating program")
        if program.context is not context:
            raise RuntimeError("Failed to create ExecObj: the program belongs to another context")
        self._program = program
        self._slots: dict[int, Slot] = {}
        self._buffers: list[QBuffer] | None = None
        # An enqueue ends a round: the next setData replaces all buffers, not only its own (§4.8).
        self._enqueued = False
        self._future: Future[QStatus] | None = None
        self._id = next(_ids)
        program.exec_objs.add(self)

    def getId(self) -> int:
        """Return the id of this ExecObj, unique in the process."""
        return self._id

    def setData(self, buffers: Sequence[Any], dims: BufferDimensionsVecRef | None = None) -> QStatus:
        """Set one QBuffer per binding (classic), or `(index, array)` for some of them (sparse).

        Args:
            buffers: in the order of the bindings if classic. A sparse array is used in place: inputs are read from it
                and outputs written into it, so it must be C-contiguous; bindings that are not set until enqueue are
                skipped.
            dims: item size and dims of each buffer; None: those of the bindings.

        Raises:
            TypeError: the entries are neither QBuffers nor tuples.
        """
        sparse = bool(buffers) and all(isinstance(entry, tuple) for entry in buffers)
        if sparse and dims is None:
            return self._set_arrays(buffers, None, {})
        if not all(isinstance(buffer, QBuffer) for buffer in buffers):
            raise TypeError("setData(): incompatible function arguments: QBuffers or (index, array) tuples are needed")
        return self._set_buffers(buffers, dims)

    def setDataWithSlices(
        self, slices: Arrays, spec: SlicingSpec, parameters: Sequence[tuple[str, int]]
    ) -> tuple[QStatus, SlicingSpec | None]:
        """Set arrays as sparse setData does; arrays that the spec names are blocks of retained state (§4.8)."""
        if not isinstance(spec, SlicingSpec):
            raise TypeError("setDataWithSlices(): a handle of createSlicingSpecHandle is needed")
        status = self._set_arrays(slices, spec, dict(parameters))
        return status, spec if status == QStatus.QS_SUCCESS else None

    def run(self, buffers: Sequence[Any] | None = None) -> QStatus:
        """Run one inference and wait for it."""
        if buffers is not None and (status := self.setData(buffers)) != QStatus.QS_SUCCESS:
            return status
        if self._future is not None:
            return QStatus.QS_BUSY
        inference = self._inference()
        return QStatus.QS_INVAL if inference is None else inference.run()

    def waitForCompletion(self) -> QStatus:
        """Wait for the enqueued inference and return its status."""
        if self._future is None:
            log("waitForCompletion: nothing is enqueued")
            return QStatus.QS_INVAL
        future, self._future = self._future, None
        return future.result()

    def settle(self) -> None:
        """Wait and leave the status to waitForCompletion, for an InferenceSet; the real binding has no such method."""
        if (future := self._future) is not None:
            wait([future])

    def getData(self) -> tuple[QStatus, list[QBuffer]]:
        """Return the buffers of all bindings, inputs included, in their order; empty buffers after sparse setData."""
        if self._future is not None:
            return QStatus.QS_BUSY, []
        return (QStatus.QS_INVAL, []) if self._buffers is None else (QStatus.QS_SUCCESS, list(self._buffers))

    def _set_buffers(self, buffers: Sequence[QBuffer], dims: BufferDimensionsVecRef | None) -> QStatus:
        if (status := self._set_status()) != QStatus.QS_SUCCESS:
            return status
        qpc = self._program.qpc
        if dims is None and not qpc.allowed and len(buffers) == len(qpc.bindings):
            dims = BufferDimensionsVecRef(map(_default_dims, qpc.bindings, buffers))
        if dims is None or not len(buffers) == len(dims) == len(qpc.bindings):
            actual = f"{len(buffers)} buffers and {'no' if dims is None else len(dims)} dims"
            log(f"{len(qpc.bindings)} buffers with dims are needed, one per binding; there are {actual}")
            return QStatus.QS_INVAL
        partial = any(binding.partial for binding in qpc.bindings)
        for index, (binding, buffer, (itemsize, shape)) in enumerate(zip(qpc.bindings, buffers, dims, strict=True)):
            if buffer.size != itemsize * math.prod(shape) or (partial and buffer.size > binding.size):
                log(f"Unexpected buffer size at index {index}: {buffer.size}, {itemsize} x {shape} of {binding.size}")
                return QStatus.QS_ERROR
        slices = {index: slot for index, slot in self._current_slots().items() if slot.start is not None}
        for index, (buffer, (itemsize, shape)) in enumerate(zip(buffers, dims, strict=True)):
            if buffer.size or index not in slices:
                self._slots[index] = Slot(np.frombuffer(buffer, np.uint8), itemsize, tuple(shape))
        self._buffers = list(buffers)
        return QStatus.QS_SUCCESS

    def _set_arrays(self, arrays: Arrays, spec: SlicingSpec | None, parameters: dict[str, int]) -> QStatus:
        if (status := self._set_status()) != QStatus.QS_SUCCESS:
            return status
        bindings = self._program.qpc.bindings
        slots: dict[int, Slot] = {}
        try:
            for index, array in arrays:
                if not 0 <= index < len(bindings):
                    raise ValueError(f"there is no binding {index}")
                slots[index] = self._slot(bindings[index], array, spec, parameters)
        except ValueError as error:
            log(f"setData: {error}")
            return QStatus.QS_INVAL
        self._current_slots().update(slots)
        self._buffers = self._buffers or [QBuffer(b"") for _ in bindings]
        return QStatus.QS_SUCCESS

    def _slot(
        self, binding: Binding, array: np.ndarray[Any, Any], spec: SlicingSpec | None, parameters: dict[str, int]
    ) -> Slot:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"setData(): {binding.name} is a {type(array).__name__}, not an array")
        if not array.flags.c_contiguous or not (binding.is_input or array.flags.writeable):
            raise ValueError(f"the array for {binding.name} is not C-contiguous, or read-only for an output")
        start = None if spec is None else spec.start(binding.name, array.itemsize, array.ndim, parameters)
        if start is not None and not binding.partial:
            raise ValueError(f"{binding.name} is not retained state, so it has no slices")
        return Slot(array.reshape(-1).view(np.uint8), array.itemsize, rank1(array.shape), start)

    def _set_status(self) -> QStatus:
        """Return QS_SUCCESS if buffers may be set now."""
        if self._future is not None:
            return QStatus.QS_BUSY
        if self._program.activation is None:
            log("Invalid program state, not activated")
            return QStatus.QS_INVAL
        return QStatus.QS_SUCCESS

    def _current_slots(self) -> dict[int, Slot]:
        """Return the slots of this round; an enqueue has ended the last one."""
        if self._enqueued:
            self._slots, self._buffers, self._enqueued = {}, None, False
        return self._slots

    def _submit(self, executor: ThreadPoolExecutor) -> QStatus:
        if self._future is not None:
            return QStatus.QS_BUSY
        inference = self._inference()
        if inference is None:
            return QStatus.QS_INVAL
        self._future = executor.submit(inference.run)
        return QStatus.QS_SUCCESS

    def _inference(self) -> Inference | None:
        activation = self._program.activation
        if activation is None or self._buffers is None:
            log("Invalid program state, not activated" if activation is None else "setData has not been called")
            return None
        self._enqueued = True
        return Inference(activation, [self._slots.get(i, SKIPPED) for i in range(len(activation.bindings))])


def _default_dims(binding: Binding, buffer: QBuffer) -> tuple[int, Dims]:
    """Return item size and dims of a buffer without dims: (0,) if empty, else the binding's, or those of a part."""
    dims, itemsize = rank1(binding.dims), binding.dtype.itemsize
    if not buffer.size:
        return itemsize, (0,)
    axis = next((axis for axis, size in enumerate(dims) if size > 1), 0)
    rows, rest = divmod(buffer.size, itemsize * math.prod(dims[axis + 1 :]))
    if binding.partial and not rest:
        dims = (*dims[:axis], rows, *dims[axis + 1 :])
    return itemsize, dims


class QAicQueueProperties:
    """Properties of a Queue."""

    __slots__ = ("numThreadsPerQueue",)

    def __init__(self) -> None:
        self.numThreadsPerQueue = 4


class Queue:
    """Runs inferences in the order of their enqueue, on one thread.

    Raises:
        RuntimeError: the card is not in the context.
    """

    def __init__(self, context: Context, qid: int) -> None:
        if qid not in context.qids:
            raise RuntimeError(f"Failed to create Queue: device {qid} is not in the context {context.qids}")
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"qaic-sim-{qid}")

    def initProperties(self, properties: QAicQueueProperties) -> QStatus:
        """Accept a number of threads; the simulator uses one, so inferences run in the order of their enqueue."""
        return QStatus.QS_SUCCESS if properties.numThreadsPerQueue > 0 else QStatus.QS_INVAL

    def enqueue(self, execobj: ExecObj) -> QStatus:
        """Start an inference and return at once; QS_BUSY until waitForCompletion was called for the last one."""
        return execobj._submit(self._executor)
