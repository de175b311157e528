# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.sdk.simulated import device
from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.bindings import qaicrt as rt
from qeff_validate.sdk.simulated.compiler import qaic_compile


@pytest.fixture(autouse=True)
def fresh_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cards", {})
    monkeypatch.delenv("QAIC_SIM_DEVICES", raising=False)


def model(
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[int, Sequence[Any] | None]],
    outputs: Mapping[str, tuple[int, Sequence[Any] | None]],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    **options: Any,
) -> onnx.ModelProto:
    def infos(values: Mapping[str, tuple[int, Sequence[Any] | None]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, *value) for name, value in values.items()]

    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "g", infos(inputs), infos(outputs), tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=options.pop("opsets", opsets), ir_version=9, **options)


def linear(rows: Any = "batch_size", cols: Any = 32) -> onnx.ModelProto:
    """y = x @ W + b, with a weight that is large enough to be stored outside of the graph."""
    rng = np.random.default_rng(0)
    weights = {"W": rng.normal(size=(32, 32)).astype(np.float32), "b": rng.normal(size=32).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    float32 = TensorProto.FLOAT
    return model(nodes, {"x": (float32, [rows, cols])}, {"y": (float32, [rows, 32])}, weights)


@dataclass
class Compiled:
    code: int
    out: str
    err: str
    directory: Path

    @property
    def file(self) -> Path:
        return self.directory / "programqpc.bin"

    @property
    def desc(self) -> Any:
        status, buffer = rt.Qpc(str(self.directory)).getIoDescriptor()
        assert status == rt.QStatus.QS_SUCCESS
        return aicapi.IoDesc.FromString(bytes(buffer))


@pytest.fixture
def compile_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Compiled]:
    """Compile a model in this process; `specs` and `custom_io` are written to the files that the flags name."""

    def run(
        proto: onnx.ModelProto | Path,
        *flags: str,
        specs: Any = None,
        custom_io: str | None = None,
        name: str = "qpc",
    ) -> Compiled:
        path = proto if isinstance(proto, Path) else tmp_path / f"{name}.onnx"
        if not isinstance(proto, Path):
            path.write_bytes(proto.SerializeToString())
        argv = [
            "-aic-hw",
            "-aic-hw-version=ai100",
            f"-m={path}",
            f"-aic-binary-dir={tmp_path / name}",
            *flags,
        ]
        if specs is not None:
            file = tmp_path / f"{name}-specializations.json"
            file.write_text(specs if isinstance(specs, str) else json.dumps({"specializations": specs}))
            argv.append(f"-network-specialization-config={file}")
        if custom_io is not None:
            file = tmp_path / f"{name}-custom_io.yaml"
            file.write_text(custom_io)
            argv.append(f"-custom-IO-list-file={file}")
        capsys.readouterr()
        code = qaic_compile.main(argv)
        captured = capsys.readouterr()
        sys.stdout.write(captured.err)  # shown when the test fails
        return Compiled(code, captured.out, captured.err, tmp_path / name)

    return run


class Client:
    """A session as real clients write it (card-contract §2.5)."""

    def __init__(self, directory: Path, *, activate: bool = True) -> None:
        self.context = rt.Context(rt.QIDList([0]))
        self.queue = rt.Queue(self.context, 0)
        self.qpc = rt.Qpc(str(directory))
        self.desc = aicapi.IoDesc.FromString(bytes(self.qpc.getIoDescriptor()[1]))
        self.bindings = list(self.desc.selected_set.bindings)
        self.index = {binding.name: binding.index for binding in self.bindings}
        self.program = rt.Program(self.context, 0, self.qpc, rt.QAicProgramProperties())
        self.execobj: Any = None
        if activate:
            assert self.program.load() == rt.QStatus.QS_SUCCESS
            assert self.program.activate() == rt.QStatus.QS_SUCCESS
            self.execobj = rt.ExecObj(self.context, self.program)
        self.buffers = [rt.QBuffer(bytes(binding.size)) for binding in self.bindings]
        itemsize = [self.dtype(binding.name).itemsize for binding in self.bindings]
        self.dims = rt.BufferDimensionsVecRef(
            [(size, list(binding.dims)) for size, binding in zip(itemsize, self.bindings, strict=True)]
        )

    def dtype(self, name: str) -> np.dtype:
        types = {0: "f4", 1: "f2", 2: "i1", 3: "u1", 6: "i4", 7: "i8", 8: "i1", 11: "u2"}
        return np.dtype(types[self.bindings[self.index[name]].type])

    def set(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.buffers[self.index[name]] = rt.QBuffer(array.tobytes())
            self.dims[self.index[name]] = (array.itemsize, array.shape or (1,))

    def status(self) -> rt.QStatus:
        assert self.execobj.setData(self.buffers, self.dims) == rt.QStatus.QS_SUCCESS
        assert self.queue.enqueue(self.execobj) == rt.QStatus.QS_SUCCESS
        return self.execobj.waitForCompletion()

    def run(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.set(**arrays)
        assert self.status() == rt.QStatus.QS_SUCCESS
        status, buffers = self.execobj.getData()
        assert status == rt.QStatus.QS_SUCCESS
        return {
            binding.name: np.frombuffer(buffers[binding.index], self.dtype(binding.name)).reshape(
                self.dims[binding.index][1]
            )
            for binding in self.bindings
            if binding.dir == aicapi.BUFFER_IO_TYPE_OUTPUT and buffers[binding.index].size
        }


@pytest.fixture
def client() -> type[Client]:
    return Client


@pytest.fixture
def make_model() -> Callable[..., onnx.ModelProto]:
    return model


@pytest.fixture
def make_linear() -> Callable[..., onnx.ModelProto]:
    return linear
