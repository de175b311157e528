# SPDX-License-Identifier: Apache-2.0
"""A client of the Cloud AI 100 SDK in the manner of the official samples: it knows a prefix and nothing else.

``sample.py PREFIX FOLDER [--old]`` makes two small models, compiles them with the prefix's compiler, runs them with its
bindings, and prints what came out as JSON. It judges nothing: who started it does.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PREFIX, FOLDER, OLD = Path(sys.argv[1]), Path(sys.argv[2]), "--old" in sys.argv

try:
    import qaicrt
except ImportError:
    sys.path.append(str(PREFIX / "dev" / "lib" / platform.machine()))
    import qaicrt
try:
    import QAicApi_pb2 as aicapi
except ImportError:
    sys.path.append(str(PREFIX / "dev" / "python"))
    import QAicApi_pb2 as aicapi

DTYPES = {
    aicapi.FLOAT_TYPE: np.dtype(np.float32),
    aicapi.FLOAT_16_TYPE: np.dtype(np.float16),
    aicapi.INT64_I_TYPE: np.dtype(np.int64),
}
WEIGHT = np.arange(-12, 12, dtype=np.float32).reshape(4, 6)
OK = qaicrt.QStatus.QS_SUCCESS


def ok(status: Any) -> None:
    if status != OK:
        sys.exit(f"the runtime says {status}")


# --- models ----------------------------------------------------------------------------------------


def save(name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> Path:
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = FOLDER / f"{name}.onnx"
    onnx.save(model, path)
    return path


def classifier() -> Path:
    """Output = relu(x @ WEIGHT)."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])
    return save("classifier", nodes, [x], [y], [numpy_helper.from_array(WEIGHT, "w")])


def counter() -> Path:
    """A running sum that stays on the card."""
    nodes = [
        helper.make_node("Add", ["x", "past_sum"], ["past_sum_RetainedState"]),
        helper.make_node("Identity", ["past_sum_RetainedState"], ["y"]),
    ]
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "seq"])
        for n in ("x", "past_sum", "y", "past_sum_RetainedState")
    ]
    return save("counter", nodes, infos[:2], infos[2:], [])


def build(model: Path, *flags: str) -> str:
    """Compile, as the samples do: exit code 0 and the file mean success."""
    directory = FOLDER / f"{model.stem}-qpc"
    tool = "qaic-exec" if OLD else "qaic-compile"
    manner = ["-aic-hw-version=2.0", "-compile-only"] if OLD else ["-aic-hw-version=ai100"]
    command = [str(PREFIX / "exec" / tool), "-aic-hw", *manner, f"-m={model}", "-aic-num-cores=4", *flags]
    subprocess.run(
        [*command, "-convert-to-fp16", f"-aic-binary-dir={directory}"], check=True, stdout=subprocess.DEVNULL
    )
    if not (directory / "programqpc.bin").is_file():
        sys.exit("the compiler wrote no program")
    return str(directory)


def specializations(*entries: dict[str, str]) -> str:
    path = FOLDER / "specializations.json"
    path.write_text(json.dumps({"specializations": list(entries)}))
    return f"-network-specialization-config={path}"


# --- one inference at a time: ExecObj and Queue ----------------------------------------------------


class Session:
    """One program on one card; arrays by name, an empty array means that the buffer is skipped."""

    def __init__(self, directory: str) -> None:
        self.context = qaicrt.Context(qaicrt.QIDList([0]))
        ok(self.context.setLogLevel(qaicrt.QLogLevel.QL_WARN))
        self.queue = qaicrt.Queue(self.context, 0)
        qpc = qaicrt.Qpc(directory)
        status, data = qpc.getIoDescriptor()
        ok(status)
        description = aicapi.IoDesc()
        description.ParseFromString(bytes(data))
        self.shapes = [[list(shape.dims) for shape in entry.shapes] for entry in description.allowed_shapes]
        self.bindings = list(description.selected_set.bindings)
        properties = qaicrt.QAicProgramProperties()
        properties.dataPathTimeoutMs = 60_000
        if OLD:
            properties.SubmitRetryTimeoutMs = 60_000
        self.program = qaicrt.Program(self.context, 0, qpc, properties)
        ok(self.program.load())
        ok(self.program.activate())
        self.execobj = qaicrt.ExecObj(self.context, self.program)
        self.buffers = [qaicrt.QBuffer(bytes(binding.size)) for binding in self.bindings]
        self.dims = qaicrt.BufferDimensionsVecRef(
            [(DTYPES[binding.type].itemsize, list(binding.dims)) for binding in self.bindings]
        )

    def run(self, **arrays: Any) -> dict[str, Any]:
        names = {binding.name: binding.index for binding in self.bindings}
        for name, array in arrays.items():
            self.buffers[names[name]] = qaicrt.QBuffer(array.tobytes())
            self.dims[names[name]] = (array.itemsize, array.shape)
        ok(self.execobj.setData(self.buffers, self.dims))
        ok(self.queue.enqueue(self.execobj))
        ok(self.execobj.waitForCompletion())
        status, buffers = self.execobj.getData()
        ok(status)
        return {
            binding.name: np.frombuffer(bytes(buffers[binding.index]), DTYPES[binding.type])
            .reshape(self.dims[binding.index][1])
            .tolist()
            for binding in self.bindings
            if binding.dir == aicapi.BUFFER_IO_TYPE_OUTPUT and buffers[binding.index].size
        }

    def close(self) -> None:
        del self.execobj
        ok(self.program.deactivate())
        ok(self.program.unload())


def classified() -> dict[str, Any]:
    session = Session(build(classifier(), specializations({"batch": "1"}, {"batch": "3"})))
    results = []
    for rows in (1, 3, 1):
        x = np.arange(4 * rows, dtype=np.float32).reshape(rows, 4) - rows
        results.append({"x": x.tolist(), **session.run(x=x, y=np.zeros((rows, 6), np.float32))})
    shapes = session.shapes
    session.close()
    return {"runs": results, "allowed_shapes": shapes}


def counted() -> list[Any]:
    session = Session(build(counter(), specializations({"seq": "5"}), "-retained-state"))
    skip = np.array([])
    ones = np.ones((1, 5), np.float32)
    first = session.run(x=ones, past_sum=7 * ones, past_sum_RetainedState=skip)
    later = [session.run(x=2 * ones, past_sum=skip) for _ in range(2)]
    session.close()
    return [first, *later]


# --- several at once: InferenceSet -----------------------------------------------------------------


def batched(directory: str) -> list[Any]:
    context = qaicrt.Context()
    qpc = qaicrt.Qpc(directory)
    mappings = qpc.getBufferMappings()
    pool = qaicrt.InferenceSet(context, qpc, 0, 2, 2)
    by_name = {mapping.bufferName: mapping for mapping in mappings}
    results = []
    for number in range(8):
        status, handle = pool.getAvailable()
        ok(status)
        buffers = qaicrt.InferenceVector(mappings).getVector()
        x = np.full((1, 4), number, np.float32)
        if x.nbytes != by_name["x"].size or by_name["x"].ioType != qaicrt.BufferIoTypeEnum.BUFFER_IO_TYPE_INPUT:
            sys.exit("x is not what it was compiled as")
        buffers[by_name["x"].index] = qaicrt.QBuffer(x)
        ok(handle.setBuffers(buffers))
        ok(pool.submit(handle, number))
        status, done = pool.getCompletedId(number)
        ok(status)
        status, data = done.execObj().getData()
        ok(status)
        results.append(np.frombuffer(bytes(data[by_name["y"].index]), np.float32).tolist())
        ok(pool.putCompleted(done))
    return results


# --- tools -----------------------------------------------------------------------------------------


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(PREFIX / "tools" / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    status, ids = qaicrt.Util().getDeviceIds()
    ok(status)
    model = classifier()
    fixed = model.rename(model.with_name("fixed.onnx"))
    outputs = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "classified": classified(),
        "counted": counted(),
        "batched": batched(build(fixed, "-onnx-define-symbol=batch,1")),
        "device_ids": list(ids),
        "query": tool("qaic-util", "-q"),
        "tool_version": tool("qaic-version-util", "--apps"),
        "xml_version": next(ET.parse(PREFIX / "versions" / "apps.xml").iter("base_version")).text,
        "simulated": qaicrt.SIMULATED,
        "files": [qaicrt.__file__, aicapi.__file__],
        "library_loaded": "qeff_validate" in sys.modules,
    }
    print(json.dumps(outputs))


if __name__ == "__main__":
    main()
