# SPDX-License-Identifier: Apache-2.0
"""ExecObj and Queue of the `qaicrt` API: one inference at a time per ExecObj, run by the Queue's thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from ._program import Binding, Context, Program
from ._values import BufferDimensionsVecRef, QBuffer, QStatus, log
from .boundary import Dims

_SKIPPED = (0,)


@dataclass(frozen=True, slots=True)
class _Job:
    """One inference with all it needs; it does not know its ExecObj, so `del execobj` frees that at once."""

    session: ort.InferenceSession
    bindings: Sequence[Binding]
    allowed: Sequence[Sequence[Dims]]
    buffers: Sequence[QBuffer]
    dims: Sequence[tuple[int, Dims]]

    def run(self) -> QStatus:
        """Matches the dims, runs, and writes the outputs into the client's buffers."""
        for binding, (_, dims) in zip(self.bindings, self.dims, strict=True):
            if binding.is_input and dims == _SKIPPED:
                log(f"Input {binding.name} is skipped, but it is not retained state")
                return QStatus.QS_INVAL
        if not self._matches():
            passed = {b.name: list(dims) for b, (_, dims) in zip(self.bindings, self.dims, strict=True)}
            log(f"No matching dimension found: passed {passed}, allowed {self._allowed()}")
            return QStatus.QS_INVAL
        parts = list(zip(self.bindings, self.buffers, self.dims, strict=True))
        feeds = {
            # A scalar travels as shape (1,), and the graph wants a scalar.
            b.name: np.frombuffer(buf, b.dtype).reshape(d if b.dims else ())
            for b, buf, (_, d) in parts
            if b.is_input
        }
        wanted = [(b, buf, d) for b, buf, (_, d) in parts if not b.is_input and d != _SKIPPED]
        try:
            results = self.session.run([b.name for b, _, _ in wanted] or None, feeds)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            log(f"QAIC_ERROR_EXECOBJ_RUNTIME Error running program: {error}")
            return QStatus.QS_ERROR
        for (binding, buffer, dims), result in zip(wanted, results, strict=False):
            if result.dtype != binding.dtype or _rank1(result.shape) != _rank1(dims):
                got, want = f"{result.dtype}{list(result.shape)}", f"{binding.dtype}{list(dims)}"
                log(f"Output {binding.name} is {got}, not {want}")
                return QStatus.QS_ERROR
            np.frombuffer(buffer, binding.dtype)[...] = result.reshape(-1)
        return QStatus.QS_SUCCESS

    def _allowed(self) -> Sequence[Sequence[Dims]]:
        return self.allowed or [[binding.dims for binding in self.bindings]]

    def _matches(self) -> bool:
        """Tells whether some allowed shapes equal the dims of all bindings that are not skipped (§4.3)."""
        return any(
            all(
                dims == _SKIPPED or (itemsize == binding.dtype.itemsize and _rank1(shape) == _rank1(dims))
                for binding, shape, (itemsize, dims) in zip(self.bindings, entry, self.dims, strict=True)
            )
            for entry in self._allowed()
        )


def _rank1(dims: Sequence[int]) -> Dims:
    """A scalar travels as shape (1,)."""
    return tuple(dims) or (1,)


class ExecObj:
    """One set of buffers for one activated program; it must be deleted before the program is deactivated."""

    def __init__(self, context: Context, program: Program) -> None:
        if program.session is None:
            if not program.auto_activates:
                raise RuntimeError("Cannot Init ExecObj, program is not active (not activated)")
            if program.load() != QStatus.QS_SUCCESS or program.activate() != QStatus.QS_SUCCESS:
                raise RuntimeError("QAIC_ERROR_EXECOBJ_RUNTIME Failed to create ExecObj: Error activating program")
        if program.context is not context:
            raise RuntimeError("Failed to create ExecObj: the program belongs to another context")
        self._program = program
        self._buffers: list[QBuffer] | None = None
        self._dims: list[tuple[int, Dims]] = []
        self._future: Future[QStatus] | None = None
        program.exec_objs.add(self)

    def setData(self, buffers: list[QBuffer], dims: BufferDimensionsVecRef | None = None) -> QStatus:
        """Sets one buffer per binding, in binding order; without dims, those of the bindings are meant."""
        if not all(isinstance(buffer, QBuffer) for buffer in buffers):
            raise TypeError("setData(): incompatible function arguments: a list of QBuffer is needed")
        if self._future is not None:
            return QStatus.QS_BUSY
        if self._program.session is None:
            log("Invalid program state, not activated")
            return QStatus.QS_INVAL
        qpc = self._program.qpc
        if dims is None and not qpc.allowed:
            dims = BufferDimensionsVecRef((b.dtype.itemsize, b.dims) for b in qpc.bindings)
        if dims is None or not len(buffers) == len(dims) == len(qpc.bindings):
            given = f"{len(buffers)} buffers and {'no' if dims is None else len(dims)} dims"
            log(f"{len(qpc.bindings)} buffers with dims are needed, one per binding; there are {given}")
            return QStatus.QS_INVAL
        for index, (buffer, (itemsize, shape)) in enumerate(zip(buffers, dims, strict=True)):
            if buffer.size != itemsize * math.prod(shape):
                log(f"Unexpected buffer size at index {index}: {buffer.size}, not {itemsize} x {shape}")
                return QStatus.QS_ERROR
        self._buffers = list(buffers)
        self._dims = [(itemsize, tuple(shape)) for itemsize, shape in dims]
        return QStatus.QS_SUCCESS

    def run(self, buffers: list[QBuffer] | None = None) -> QStatus:
        """Runs one inference and waits for it."""
        if buffers is not None and (status := self.setData(buffers)) != QStatus.QS_SUCCESS:
            return status
        if self._future is not None:
            return QStatus.QS_BUSY
        job = self._job()
        return QStatus.QS_INVAL if job is None else job.run()

    def waitForCompletion(self) -> QStatus:
        """Waits for the enqueued inference and returns how it ended."""
        if self._future is None:
            log("waitForCompletion: nothing is enqueued")
            return QStatus.QS_INVAL
        future, self._future = self._future, None
        try:
            return future.result()
        except Exception as error:  # a status is all that a client of the real binding would get
            log(f"QAIC_ERROR_EXECOBJ_RUNTIME simulator failed: {error!r}")
            return QStatus.QS_ERROR

    def getData(self) -> tuple[QStatus, list[QBuffer]]:
        """Returns the buffers of all bindings, inputs included, in binding order."""
        if self._future is not None:
            return QStatus.QS_BUSY, []
        return (QStatus.QS_INVAL, []) if self._buffers is None else (QStatus.QS_SUCCESS, list(self._buffers))

    def _submit(self, executor: ThreadPoolExecutor) -> QStatus:
        if self._future is not None:
            return QStatus.QS_BUSY
        job = self._job()
        if job is None:
            return QStatus.QS_INVAL
        self._future = executor.submit(job.run)
        return QStatus.QS_SUCCESS

    def _job(self) -> _Job | None:
        session, qpc = self._program.session, self._program.qpc
        if session is None or self._buffers is None:
            log("Invalid program state, not activated" if session is None else "setData has not been called")
            return None
        return _Job(session, qpc.bindings, qpc.allowed, self._buffers, self._dims)


class QAicQueueProperties:
    """Properties of a Queue."""

    __slots__ = ("numThreadsPerQueue",)

    def __init__(self) -> None:
        self.numThreadsPerQueue = 4


class Queue:
    """Runs inferences in the order in which they are enqueued, on one thread of its own."""

    def __init__(self, context: Context, qid: int) -> None:
        if qid not in context.qids:
            raise RuntimeError(f"Failed to create Queue: device {qid} is not in the context {context.qids}")
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"qaic-sim-{qid}")

    def initProperties(self, properties: QAicQueueProperties) -> QStatus:
        """Accepts a number of threads; the simulator keeps to one, so the order is that of enqueue."""
        return QStatus.QS_SUCCESS if properties.numThreadsPerQueue > 0 else QStatus.QS_INVAL

    def enqueue(self, execobj: ExecObj) -> QStatus:
        """Starts an inference and returns at once; QS_BUSY while one has not been waited for."""
        return execobj._submit(self._executor)
