# SPDX-License-Identifier: Apache-2.0
"""Shows one error of an exported or compiled model: runs a part of its graph and compares with the original model.

Needs numpy and onnxruntime; where repro.json has flags of a compiler, the AI 100 SDK in place of onnxruntime.
Exit code 1: the error shows. 0: it is gone. 3: it could not be run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent

TYPES = {0: "float32", 1: "float16", 5: "int32", 6: "int32", 7: "int64", 8: "int8"}
"""Numbers of data types in the description of a program."""


def main() -> int:
    """Run and compare; return the exit code."""
    prefix = os.environ.get("QEFF_VALIDATE_SDK", "/opt/qti-aic")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER / "model.onnx", help="another ONNX file in its place")
    parser.add_argument("--sdk", type=Path, default=Path(prefix), help="prefix of the AI 100 SDK")
    parser.add_argument("--device", type=int, default=0, help="number of the card")
    given = parser.parse_args()
    try:
        about = json.loads((FOLDER / "repro.json").read_text(encoding="utf-8"))
        with np.load(FOLDER / "data.npz") as stored:
            data = {name: stored[name] for name in stored.files}
        inputs = {name: data[f"input{place}"] for place, name in enumerate(about["inputs"])}
        if about["compiler"] is None:
            actual = run_onnxruntime(given.model, inputs, about)
        else:
            with tempfile.TemporaryDirectory() as folder:
                program = Path(folder) / "qpc"
                compile_program(given.sdk, given.model.resolve(), program, about)
                actual = run_program(given.sdk, given.device, program, inputs, about["output"])
    except Exception:  # a traceback alone would end with 1, which means that the error shows
        traceback.print_exc()
        return 3
    return compare(about, data["expected"], np.asarray(actual, np.float64), data.get("tokens"))


def run_onnxruntime(model: Path, inputs: dict[str, Any], about: dict[str, Any]) -> Any:
    """Return the output of the model in ONNX Runtime."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, about["optimization"])
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    print(f"onnxruntime {onnxruntime.__version__}, {about['optimization']}, {model.name}")
    return session.run([about["output"]], inputs)[0]


def compile_program(sdk: Path, model: Path, program: Path, about: dict[str, Any]) -> None:
    """Compile the model with the SDK's compiler."""
    compiler = next(path for name in ("qaic-compile", "qaic-exec") if (path := sdk / "exec" / name).exists())
    command = [str(compiler), *about["compiler"], f"-m={model}", f"-aic-binary-dir={program}"]
    print(f"{compiler.name} {' '.join(about['compiler'])}")
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the compiler ended with {done.returncode}: {done.stdout}{done.stderr}")


def run_program(sdk: Path, device: int, program: Path, inputs: dict[str, Any], output: str) -> Any:
    """Return an output of a compiled program, by the SDK's qaicrt."""
    sys.path.insert(0, str(sdk / "dev" / "lib" / platform.machine()))
    qaicrt = importlib.import_module("qaicrt")
    sys.path.append(str(sdk / "dev" / "python"))
    messages = importlib.import_module("QAicApi_pb2")
    context = qaicrt.Context(qaicrt.QIDList([device]))
    queue = qaicrt.Queue(context, device)
    qpc = qaicrt.Qpc(str(program))
    description = messages.IoDesc.FromString(bytes(value(qaicrt, "getIoDescriptor", qpc.getIoDescriptor())))
    bindings = sorted(description.selected_set.bindings, key=lambda binding: binding.index)
    arrays = [
        np.ascontiguousarray(inputs[binding.name].astype(TYPES[binding.type]))
        if binding.dir == 0
        else np.full(list(binding.dims), 0, TYPES[binding.type])
        for binding in bindings
    ]
    loaded = qaicrt.Program(context, device, qpc, qaicrt.QAicProgramProperties())
    check(qaicrt, "load", loaded.load())
    check(qaicrt, "activate", loaded.activate())
    execution = qaicrt.ExecObj(context, loaded)
    buffers = [qaicrt.QBuffer(array.tobytes()) for array in arrays]
    dims = qaicrt.BufferDimensionsVecRef([(array.itemsize, list(array.shape) or [1]) for array in arrays])
    check(qaicrt, "setData", execution.setData(buffers, dims))
    check(qaicrt, "enqueue", queue.enqueue(execution))
    check(qaicrt, "waitForCompletion", execution.waitForCompletion())
    results = value(qaicrt, "getData", execution.getData())
    place = [binding.name for binding in bindings].index(output)
    found = np.frombuffer(bytes(results[place]), arrays[place].dtype).reshape(arrays[place].shape).copy()
    del execution, results  # before the card is given back
    check(qaicrt, "deactivate", loaded.deactivate())
    check(qaicrt, "unload", loaded.unload())
    return found


def value(qaicrt: Any, name: str, result: tuple[Any, Any]) -> Any:
    """Return the value of a call that returns a status and a value."""
    check(qaicrt, name, result[0])
    return result[1]


def check(qaicrt: Any, name: str, status: Any) -> None:
    """Raise if a call failed."""
    if status != qaicrt.QStatus.QS_SUCCESS:
        raise RuntimeError(f"{name} failed with {status}")


def compare(about: dict[str, Any], expected: Any, actual: Any, tokens: Any) -> int:
    """Print the error of an output; return 1 if it is beyond the bound, else 0."""
    print(about["summary"])
    name, bound = about["output"], about["bound"]
    if actual.size != expected.size:
        print(f"output {name!r} has shape {list(actual.shape)} instead of {list(expected.shape)}: the error shows")
        return 1
    actual = actual.reshape(expected.shape)
    shape = list(expected.shape)
    if tokens is not None:
        expected, actual = expected[tokens], actual[tokens]
    wrong = ~np.isfinite(actual)
    difference = np.where(wrong, np.inf, np.abs(np.where(wrong, 0, actual) - expected))
    norm = float(np.linalg.norm(expected)) or 1.0
    error = float("inf") if wrong.any() else float(np.linalg.norm(difference)) / norm
    at = np.unravel_index(int(difference.argmax()), difference.shape)
    print(f"output {name!r} {shape}: relative L2 error {error:.3g}, at most {bound:.3g} is rounding")
    print(f"worst element {[int(place) for place in at]}: {actual[at]:.6g} instead of {expected[at]:.6g}")
    shows = not error <= bound
    print("the error shows" if shows else "the error is gone")
    return int(shows)


if __name__ == "__main__":
    sys.exit(main())
