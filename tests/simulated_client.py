# SPDX-License-Identifier: Apache-2.0
"""A client of the simulated bindings, written as real clients are: classic buffers, one ExecObj, one queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.bindings import qaicrt as rt

OK = rt.QStatus.QS_SUCCESS
DTYPES = {0: "f4", 1: "f2", 3: "u1", 6: "i4", 7: "i8", 8: "i1"}


def iodesc(directory: str) -> Any:
    """Return the parsed IoDesc of a QPC."""
    status, data = rt.Qpc(directory).getIoDescriptor()
    assert status == OK
    return aicapi.IoDesc.FromString(bytes(data))


class Client:
    """A session in the order of card-contract §2.5; buffers stay as set, or skipped, until they are replaced."""

    def __init__(self, directory: str, *, program: Any = None, props: Any = None, qid: int | None = 0) -> None:
        self.context = program.context if program else rt.Context()
        self.queue = rt.Queue(self.context, self.context.qids[0])
        self.bindings = list(iodesc(directory).selected_set.bindings)
        self.index = {binding.name: binding.index for binding in self.bindings}
        self.program = program
        if program is None:
            props = props or rt.QAicProgramProperties()
            self.program = rt.Program(self.context, qid, rt.Qpc(directory), props)
            assert self.program.load() == OK
            assert self.program.activate() == OK
        self.execobj: Any = rt.ExecObj(self.context, self.program)
        self.buffers = [rt.QBuffer(bytes(binding.size)) for binding in self.bindings]
        sizes = [(np.dtype(DTYPES[b.type]).itemsize, list(b.dims)) for b in self.bindings]
        self.dims = rt.BufferDimensionsVecRef(sizes)
        self.skip(*(binding.name for binding in self.bindings if binding.is_partial_buf_allowed))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return what numpy calls the type of a binding."""
        return np.dtype(DTYPES[self.bindings[self.index[name]].type])

    def set(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put arrays into the buffers."""
        for name, array in arrays.items():
            self.buffers[self.index[name]] = rt.QBuffer(array.tobytes())
            self.dims[self.index[name]] = (array.itemsize, array.shape or (1,))

    def skip(self, *names: str) -> None:
        """Empty the buffers, which means that nothing travels."""
        self.set({name: np.array([]) for name in names})

    def status(self) -> rt.QStatus:
        """Run once and return the status of the wait."""
        assert self.execobj.setData(self.buffers, self.dims) == OK
        assert self.queue.enqueue(self.execobj) == OK
        return self.execobj.waitForCompletion()

    def run(self, arrays: Mapping[str, np.ndarray], **outputs: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Run once with these inputs and shapes of outputs, and return the outputs that are not skipped."""
        self.set({name: np.zeros(shape, self.dtype(name)) for name, shape in outputs.items()} | dict(arrays))
        assert self.status() == OK
        status, buffers = self.execobj.getData()
        assert status == OK
        return {
            b.name: np.frombuffer(buffers[b.index], self.dtype(b.name)).reshape(self.dims[b.index][1])
            for b in self.bindings
            if b.dir == aicapi.BUFFER_IO_TYPE_OUTPUT and buffers[b.index].size
        }


def step(client: Client, ids: Any, positions: Any) -> np.ndarray:
    """Run `simulated_graphs.cached` once, the cache skipped or set as it is, and return the logits."""
    feeds = {"input_ids": np.array(ids, np.int64), "position_ids": np.array(positions, np.int64)}
    return client.run(feeds, logits=(*feeds["input_ids"].shape, 2))["logits"]
