# SPDX-License-Identifier: Apache-2.0
"""`qaicrt.InferenceVector` and `qaicrt.InferenceSet`: a pool of ExecObjs over activations (card-contract §2.6)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .api_types import BufferDimensionsVecRef, BufferMapping, QBuffer, QStatus, log
from .execution import ExecObj, Queue
from .program import Context, Program, QAicProgramProperties
from .qpc_description import Qpc


class InferenceVector:
    """One buffer per binding, initially zeros; the list that `getVector` returns is the vector itself."""

    def __init__(self, buffer_mappings: Sequence[BufferMapping]) -> None:
        self._buffers = [QBuffer(bytes(mapping.size)) for mapping in buffer_mappings]

    def getVector(self) -> list[QBuffer]:
        """Return the buffers of the inputs and then of the outputs."""
        return self._buffers


class InferenceHandle:
    """One ExecObj of an InferenceSet, returned by `InferenceSet.getAvailable` and `getCompletedId`."""

    def __init__(self, execobj: ExecObj, queue: Queue) -> None:
        self._execobj, self.queue = execobj, queue

    def execObj(self) -> ExecObj:
        """Return the ExecObj; its getData returns the results."""
        return self._execobj

    def setBuffers(self, buffers: Sequence[QBuffer], dims: BufferDimensionsVecRef | None = None) -> QStatus:
        """Set one buffer per binding; dims are needed if the QPC has specializations."""
        return self._execobj.setData(buffers, dims)


class InferenceSet:
    """`setSize` handles on each of `numActivations` activations of one QPC, usable from several threads.

    A handle is available, then taken, then submitted, then collected, and available again after `putCompleted`.
    """

    def __init__(
        self,
        context: Context,
        qpc: Qpc,
        devId: int | None = None,
        setSize: int = 1,
        numActivations: int = 1,
        properties: QAicProgramProperties | None = None,
        enableProfiling: bool = False,
    ) -> None:
        del enableProfiling  # there is nothing to profile
        self._changed = threading.Condition()
        self._available: list[InferenceHandle] = []
        self._taken: list[InferenceHandle] = []
        self._submitted: dict[int, InferenceHandle] = {}
        for _ in range(numActivations):
            program = Program(context, devId, qpc, properties or QAicProgramProperties())
            if (status := program.load()) == QStatus.QS_SUCCESS:
                status = program.activate()
            if status != QStatus.QS_SUCCESS:
                raise RuntimeError(f"Failed to create InferenceSet: Error activating program: {status.name}")
            queue = Queue(context, context.qids[0] if devId is None else devId)
            self._available += [InferenceHandle(ExecObj(context, program), queue) for _ in range(setSize)]

    def getAvailable(self, timeoutUs: int = 0) -> tuple[QStatus, InferenceHandle | None]:
        """Take a handle as soon as one is available; QS_TIMEDOUT after `timeoutUs` microseconds, 0: never."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._available, timeoutUs / 1e6 if timeoutUs else None):
                return QStatus.QS_TIMEDOUT, None
            self._taken.append(self._available.pop(0))
            return QStatus.QS_SUCCESS, self._taken[-1]

    def submit(self, handle: InferenceHandle | InferenceVector, inference_id: int) -> QStatus:
        """Start the inference of a handle whose buffers are set; a vector takes the next available handle."""
        if isinstance(handle, InferenceVector):
            return self._submit_vector(handle, inference_id)
        with self._changed:
            if handle not in self._taken or inference_id in self._submitted:
                log(f"submit: id {inference_id} is in use, or the handle is not one that getAvailable gave")
                return QStatus.QS_INVAL
            status = handle.queue.enqueue(handle.execObj())
            if status == QStatus.QS_SUCCESS:
                self._taken.remove(handle)
                self._submitted[inference_id] = handle
            return status

    def getCompletedId(self, inference_id: int) -> tuple[QStatus, InferenceHandle | None]:
        """Wait for an inference and return its status and its handle."""
        with self._changed:
            handle = self._submitted.pop(inference_id, None)
        if handle is None:
            log(f"getCompletedId: no inference has the id {inference_id}")
            return QStatus.QS_INVAL, None
        status = handle.execObj().waitForCompletion()
        with self._changed:
            self._taken.append(handle)
        return status, handle

    def putCompleted(self, handle: InferenceHandle) -> QStatus:
        """Make a handle available again."""
        with self._changed:
            if handle not in self._taken:
                return QStatus.QS_INVAL
            self._taken.remove(handle)
            self._available.append(handle)
            self._changed.notify()
        return QStatus.QS_SUCCESS

    def waitForCompletion(self) -> QStatus:
        """Wait for all submitted inferences; their results remain to be collected."""
        with self._changed:
            handles = list(self._submitted.values())
        for handle in handles:
            handle.execObj().settle()
        return QStatus.QS_SUCCESS

    def _submit_vector(self, vector: InferenceVector, inference_id: int) -> QStatus:
        status, handle = self.getAvailable()
        if handle is None:
            return status
        if (status := handle.setBuffers(vector.getVector())) == QStatus.QS_SUCCESS:
            status = self.submit(handle, inference_id)
        if status != QStatus.QS_SUCCESS:
            self.putCompleted(handle)
        return status
