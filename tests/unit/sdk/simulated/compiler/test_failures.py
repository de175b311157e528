# SPDX-License-Identifier: Apache-2.0
"""The compiler's rows of the failure table (card-contract §8), each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

F, I64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node
ROOT = Path(__file__).parents[5]
HEAD = "QAIC_ERROR: Error message: [Operator-'{}', opset_version-18, ir_version-9]"
TAIL = "QAICException:Unable to AddNodesToGraphFromModel"


@pytest.fixture
def compile_process(tmp_path):
    def run(model, *flags, version="", fault=""):
        path = model if isinstance(model, Path) else tmp_path / "model.onnx"
        if not isinstance(model, Path):
            path.write_bytes(model.SerializeToString())
        environment = {**os.environ, "QAIC_SIM_COMPILER": version, "QAIC_SIM_COMPILER_FAULT": fault}
        command = [sys.executable, "-m", "qeff_validate.sdk.simulated.compiler", "-aic-hw", "-aic-hw-version=ai100"]
        return subprocess.run(
            [*command, f"-m={path}", f"-aic-binary-dir={tmp_path / 'qpc'}", *flags],
            capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False,
        )  # fmt: skip

    return run


def refused(done, directory: Path, *texts: str) -> None:
    assert done.returncode == 255
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not directory.exists()


def specializations(tmp_path: Path, entries) -> str:
    (tmp_path / "specs.json").write_text(json.dumps({"specializations": entries}))
    return f"-network-specialization-config={tmp_path / 'specs.json'}"


def test_named_specializations_and_an_old_sdk(tmp_path, make_linear, compile_process):
    flag = specializations(tmp_path, [{"name": "Prefill", "symbols": {"batch_size": "2"}}])
    done = compile_process(make_linear(), flag, version="1.21.2.0")
    refused(done, tmp_path / "qpc", "[json.exception.type_error.302] type must be string, but is object")
    assert compile_process(make_linear(), flag).returncode == 0


def test_retained_state_and_an_old_sdk(tmp_path, make_linear, compile_process):
    done = compile_process(make_linear(2), "-retained-state", version="1.11.0.1")
    refused(done, tmp_path / "qpc", "Invalid option -retained-state. Use -h")


def test_compile_only_and_a_new_sdk(tmp_path, make_linear, compile_process):
    refused(compile_process(make_linear(2), "-compile-only"), tmp_path / "qpc", "unknown option -compile-only")
    assert compile_process(make_linear(2), "-compile-only", version="1.20").returncode == 0


def test_a_node_that_the_importer_rejects(tmp_path, make_model, compile_process):
    m = make_model([node("MatMul", ["x", "x", "x"], ["y"])], {"x": (F, [2, 2])}, {"y": (F, [2, 2])})
    refused(compile_process(m), tmp_path / "qpc", "QAIC_ERROR: Error message: [", "opset_version-18", TAIL)


def test_dynamic_range(tmp_path, make_model, compile_process):
    nodes = [node("Range", ["zero", "n", "one"], ["y"])]
    m = make_model(nodes, {"n": (I64, [])}, {"y": (I64, ["count"])}, {"zero": np.array(0), "one": np.array(1)})
    done = compile_process(m)
    refused(done, tmp_path / "qpc", HEAD.format("Range"), "Range: 'limit' input must be a constant tensor", TAIL)


def test_trilu_with_a_diagonal_of_one_dim(tmp_path, make_model, compile_process):
    m = make_model([node("Trilu", ["x", "k"], ["y"])], {"x": (F, [3, 3])}, {"y": (F, [3, 3])}, {"k": np.array([1])})
    refused(compile_process(m), tmp_path / "qpc", "Diagonal must be scalar", "Function verification failed", TAIL)


def test_scatter_with_updates_of_another_length(tmp_path, make_model, compile_process):
    nodes = [node("ScatterND", ["x", "i", "u"], ["y"])]
    inputs = {"x": (F, ["n", 4]), "i": (I64, ["k", 1]), "u": (F, ["m", 4])}
    m = make_model(nodes, inputs, {"y": (F, ["n", 4])})
    done = compile_process(m, specializations(tmp_path, [{"n": "4", "k": "2", "m": "3"}]))
    refused(done, tmp_path / "qpc", "Indices and updates must have same lengths!", "[3, 4], not [2, 4]")


@pytest.mark.parametrize("operator", ["Expand", "Tile"])
def test_shapes_in_sub_functions(operator, tmp_path, make_model, compile_process):
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.fn", 1)]
    function = helper.make_function("my.fn", "Wide", ["a", "to"], ["r"], [node(operator, ["a", "to"], ["r"])], opsets)
    m = make_model([node("Wide", ["x", "to"], ["y"], domain="my.fn")], {"x": (F, [1, 3])}, {"y": (F, [2, 3])},
                   {"to": np.array([2, 3 if operator == "Expand" else 1])}, opsets=opsets,
                   functions=[function])  # fmt: skip
    done = compile_process(m, "-sub-functions")
    refused(done, tmp_path / "qpc", f"for {operator} in sub-function Wide", "-sub-functions")
    assert compile_process(m).returncode == 0


@pytest.mark.parametrize(("size", "code"), [("shape", 0), ("to", 255)])
def test_function_that_a_sub_function_calls_belongs_to_it(size, code, tmp_path, make_model, compile_process):
    """As in QEfficient's decoder layers: CtxGather expands to a shape that is computed in the layer."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.fn", 1)]
    inner = helper.make_function("my.fn", "Wide", ["a", "to"], ["r"], [node("Expand", ["a", "to"], ["r"])], opsets)
    nodes = [node("Shape", ["b"], ["shape"]), node("Wide", ["a", size], ["r"], domain="my.fn")]
    outer = helper.make_function("my.fn", "Layer", ["a", "b", "to"], ["r"], nodes, opsets)
    m = make_model([node("Layer", ["x", "z", "to"], ["y"], domain="my.fn")], {"x": (F, [1, 3]), "z": (F, [2, 3])},
                   {"y": (F, [2, 3])}, {"to": np.array([2, 3])}, opsets=opsets, functions=[inner, outer])  # fmt: skip
    done = compile_process(m, "-sub-functions")
    assert done.returncode == code, done.stderr
    assert code == 0 or "non-constant shape for Expand in sub-function Layer" in done.stderr


def test_two_specializations_with_the_same_inputs(tmp_path, make_linear, compile_process):
    flag = specializations(tmp_path, [{"batch_size": "2"}, {"batch_size": "2"}])
    done = compile_process(make_linear(), flag)
    refused(done, tmp_path / "qpc", "No input that uniquely identifies specialization")


def test_a_model_file_above_2_gb(tmp_path, compile_process):
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(2**31)
    done = compile_process(tmp_path / "huge.onnx")
    refused(done, tmp_path / "qpc", "protobuf parse failure", "(the file is larger than 2 GB)")


def test_missing_external_data(tmp_path, make_linear, compile_process):
    path = tmp_path / "m.onnx"
    onnx.save(make_linear(2), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    (tmp_path / "m.onnx.data").unlink()
    refused(compile_process(path), tmp_path / "qpc", "Failed to open file", "m.onnx.data", "'W'")


def test_an_interrupted_build_leaves_a_directory_without_a_program(tmp_path, make_linear, compile_process):
    done = compile_process(make_linear(2), fault="no-file")
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "qpc").iterdir()) == []
    assert compile_process(make_linear(2)).returncode == 0, "and the next build repairs it"


def test_unsupported_operators_are_all_listed(tmp_path, make_model, compile_process):
    nodes = [node("Frobnicate", ["x"], ["h"]), node("Neg", ["h"], ["i"]), node("Defrost", ["i"], ["y"])]
    m = make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])})
    texts = (HEAD.format("Frobnicate"), "unsupported operators: Frobnicate, Defrost", "-operators-supported=onnx", TAIL)
    refused(compile_process(m), tmp_path / "qpc", *texts)


def test_a_fault_of_the_simulator_itself(make_linear, compile_onnx, monkeypatch):
    from qeff_validate.sdk.simulated.compiler import qaic_compile

    monkeypatch.setattr(qaic_compile, "concrete_shapes", lambda *_: 1 / 0)
    compiled = compile_onnx(make_linear(2))
    assert compiled.code == 255
    assert "ZeroDivisionError" in compiled.err
    assert not compiled.directory.exists()


@pytest.mark.parametrize("precision", [(), ("-convert-to-fp16",)])
@pytest.mark.parametrize(
    ("domain", "operator", "words"),
    [
        ("com.microsoft", "BiasGelu", "made by ONNX Runtime's optimizer"),
        ("com.microsoft", "SkipLayerNormalization", "Optimum's ORTOptimizer: save the graph without optimization"),
        ("com.microsoft", "DynamicQuantizeMatMul", "made by onnxruntime.quantization or Optimum's ORTQuantizer"),
        ("com.microsoft.nchwc", "Conv", "for the processor that it ran on"),
        ("ai.onnx.contrib", "BertTokenizer", "onnxruntime-extensions"),
        ("ai.onnx.ml", "Normalizer", "skl2onnx"),
        ("org.pytorch.aten", "ATen", "PyTorch's exporter"),
        ("pkg.torch.ops", "scaled", "PyTorch's exporter"),
        ("my.ops", "Fancy", "a custom operator: export the model with standard operators"),
    ],
)
def test_a_contrib_operator_is_named_with_what_made_it(
    domain, operator, words, precision, tmp_path, make_model, compile_process
):
    nodes = [node(operator, ["x"], ["h"], domain=domain, name="the one"), node("Neg", ["h"], ["y"])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    m = make_model(nodes, {"x": (F, [2, 4])}, {"y": (F, [2, 4])}, opsets=opsets)
    done = compile_process(m, *precision)
    refused(done, tmp_path / "qpc", HEAD.format(operator), f"unsupported operator {domain}::{operator}", words, TAIL)
    assert f"simulator: node 'the one' ({domain}::{operator}): unsupported operator" in done.stderr.splitlines()[-1]


def broken(kind, make_model):
    """Return a model with one fault, and the simulator's message about it."""
    if kind == "no operator of ONNX":
        nodes = [node("Foo", ["x"], ["y"], name="first")]
        return make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])}), "node 'first' (ai.onnx::Foo): unsupported operator"
    if kind == "of a later opset":
        nodes = [node("LayerNormalization", ["x", "w"], ["y"])]
        weights = {"w": np.ones(3, np.float32)}
        m = make_model(nodes, {"x": (F, [2, 3])}, {"y": (F, [2, 3])}, weights, opsets=[helper.make_opsetid("", 14)])
        return m, "LayerNormalization is of a later opset than the graph's 14: ONNX Runtime's optimizer writes it"
    if kind == "of ONNX Runtime":
        nodes = [node("SimplifiedLayerNormalization", ["x", "w"], ["y"])]
        m = make_model(nodes, {"x": (F, [2, 3])}, {"y": (F, [2, 3])}, {"w": np.ones(3, np.float32)})
        return m, "SimplifiedLayerNormalization is ONNX Runtime's own"
    if kind == "no name":
        nodes = [node("Foo", ["x"], ["y"])]
        return make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])}), "the node that computes 'y' (ai.onnx::Foo): "
    if kind == "Qualcomm's":
        nodes = [node("CtxFoo", ["x"], ["y"], name="ctx", domain="com.qualcomm.cloud")]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.qualcomm.cloud", 1)]
        m = make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])}, opsets=opsets)
        return m, "node 'ctx' (com.qualcomm.cloud::CtxFoo): unsupported operator"
    if kind == "shapes":
        nodes = [node("MatMul", ["x", "w"], ["y"], name="product")]
        return make_model(nodes, {"x": (F, [2, 3])}, {"y": (F, [2, 2])}, {"w": np.ones((4, 2), np.float32)}), "product"
    if kind == "depends on data":
        nodes = [node("NonZero", ["x"], ["y"], name="search")]
        return make_model(nodes, {"x": (F, [3])}, {"y": (I64, [1, "n"])}), "node 'search' (ai.onnx::NonZero): All dims"
    nodes = [node("Neg", ["x", "x"], ["y"], name="two")]
    return make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])}), "two"


@pytest.mark.parametrize(
    "kind",
    [
        "no operator of ONNX",
        "of a later opset",
        "of ONNX Runtime",
        "no name",
        "Qualcomm's",
        "shapes",
        "depends on data",
        "inputs",
    ],
)
def test_the_simulator_says_which_node_and_why_behind_the_text_of_a_real_compiler(
    kind, tmp_path, make_model, compile_process
):
    m, words = broken(kind, make_model)
    done = compile_process(m)
    refused(done, tmp_path / "qpc", "QAIC_ERROR: Error message: [")
    real, simulated = done.stderr.splitlines()[-2:]
    assert real == TAIL
    assert simulated.startswith("simulator: ")
    assert words in simulated
