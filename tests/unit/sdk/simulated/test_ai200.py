# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on ai200; the oracle is ml_dtypes, rounded after every node."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from bounds import one_step, within
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qeff_validate.sdk.simulated import device
from qeff_validate.sdk.simulated.bindings import qaicrt as rt

F, BF = TensorProto.FLOAT, TensorProto.BFLOAT16
AI200 = "-aic-hw-version=ai200"
node = helper.make_node
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setenv("QAIC_SIM_CARD", "ai200")


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    """Return a client's buffer: bfloat16 bit patterns as uint16."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def read(container: np.ndarray) -> np.ndarray:
    return container.view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


NODES = [
    node("MatMul", ["x", "W"], ["h"]),
    node("Add", ["h", "b"], ["a"]),
    node("Reshape", ["a", "shape"], ["r"]),
    node("Softmax", ["r"], ["s"]),
    node("Transpose", ["s"], ["t"], perm=[1, 0]),
    node("Less", ["r", "zero"], ["low"]),
    node("Where", ["low", "zero", "s"], ["w"]),
    node("Mul", ["w", "r"], ["y"]),
]
WEIGHT, BIAS = (RNG.normal(size=shape).astype(np.float32) for shape in ((64, 32), (32,)))
X = RNG.normal(size=(4, 64)).astype(np.float32)


def model(kind: int) -> onnx.ModelProto:
    """The same graph in bfloat16 or in float32."""
    dtype = ml_dtypes.bfloat16 if kind == BF else np.float32
    arrays = {"W": WEIGHT, "b": BIAS, "zero": np.float32(0)}
    tensors = [numpy_helper.from_array(np.asarray(value).astype(dtype), name) for name, value in arrays.items()]
    tensors.append(numpy_helper.from_array(np.array([4, 32]), "shape"))
    shapes = {"x": [4, 64], "y": [4, 32], "t": [32, 4]}
    infos = {name: helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(NODES, "g", [infos["x"]], [infos["y"], infos["t"]], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def rounded_by_node() -> dict[str, np.ndarray]:
    """Run each node in the reference evaluator, in float32 on bfloat16 values, and round its outputs to bfloat16."""
    known = {"x": bf16(X), "W": bf16(WEIGHT), "b": bf16(BIAS), "zero": np.float32(0), "shape": np.array([4, 32])}
    for entry in NODES:
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(known[n].dtype), None) for n in entry.input
        ]
        output = helper.make_tensor_value_info(entry.output[0], F, None)
        single = helper.make_model(
            helper.make_graph([entry], "n", infos, [output]), opset_imports=[helper.make_opsetid("", 18)]
        )
        (value,) = ReferenceEvaluator(single).run(None, {n: known[n] for n in entry.input})
        known[entry.output[0]] = value if value.dtype == bool else bf16(value)
    return known


@pytest.mark.numeric
def test_each_node_rounds_to_bfloat16(compile_onnx, client):
    compiled = compile_onnx(model(BF), AI200)
    assert [(b.type, b.size) for b in compiled.desc.selected_set.bindings] == [(11, 512), (11, 256), (11, 256)]
    actual, expected = client(compiled.directory).run(x=bits(X)), rounded_by_node()
    for name in ("y", "t"):
        values = read(actual[name])
        # sums in another order may fall on the other side of a tie: one step of bfloat16
        one_step(values, expected[name], rtol=2.0**-7)
        within(np.mean(values != expected[name]), 0.05)
    exact = ReferenceEvaluator(model(F)).run(["y"], {"x": X})[0]
    assert np.abs(read(actual["y"]) - exact).max() > 1e-3, "it is not float32"


@pytest.mark.numeric
def test_custom_io_in_bfloat16(compile_onnx, client):
    text = "- {IOName: x, Precision: bfloat16}\n- {IOName: y, Precision: bfloat16}"
    compiled = compile_onnx(model(F), AI200, custom_io=text)
    assert [b.type for b in compiled.desc.selected_set.bindings] == [11, 11, 0]
    actual = client(compiled.directory).run(x=bits(X))
    expected = ReferenceEvaluator(model(F)).run(["y"], {"x": bf16(X)})[0]
    one_step(read(actual["y"]), bf16(expected), rtol=2.0**-7, atol=1e-7)
    within(np.mean(read(actual["y"]) != bf16(expected)), 0.05, "rounded, not cut off:")
    assert not np.array_equal(actual["t"], bf16(actual["t"])), "only what is listed"


def test_state_in_bfloat16(make_model, compile_onnx, client):
    nodes = [node("Add", ["total", "x"], ["total_RetainedState"])]
    m = make_model(nodes, {"x": (BF, [3]), "total": (BF, [3])}, {"total_RetainedState": (BF, [3])})
    run = client(compile_onnx(m, AI200, "-retained-state").directory)
    actual = run.run(x=bits(np.ones(3)), total=np.empty(0, np.uint16))["total_RetainedState"]
    assert np.isnan(read(actual)).all(), "content that nobody wrote"
    actual = run.run(x=bits(np.ones(3)), total=bits(np.array([1, 256, 3])))["total_RetainedState"]
    assert read(actual).tolist() == [2, 256, 4], "257 is no number in bfloat16"
    actual = run.run(x=bits(np.ones(3)), total=np.empty(0, np.uint16))["total_RetainedState"]
    assert read(actual).tolist() == [3, 256, 5]


def test_mxfp6_of_weights_in_bfloat16(compile_onnx, client):
    from microscaling import mxfp6

    weight = RNG.normal(size=(64, 48)).astype(np.float32)
    infos = [helper.make_tensor_value_info(n, BF, [64, 64 if n == "x" else 48]) for n in "xy"]
    tensor = numpy_helper.from_array(weight.astype(ml_dtypes.bfloat16), "W")
    graph = helper.make_graph([node("MatMul", ["x", "W"], ["y"])], "g", infos[:1], infos[1:], [tensor])
    m = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    actual = client(compile_onnx(m, AI200, "-mxfp6-matmul").directory).run(x=bits(np.eye(64, dtype=np.float32)))["y"]
    assert np.array_equal(read(actual), mxfp6(bf16(weight), 0))


def test_ai100_has_no_bfloat16(compile_onnx):
    for compiled in (
        compile_onnx(model(BF)),
        compile_onnx(model(F), custom_io="- {IOName: x, Precision: bfloat16}"),
    ):
        assert compiled.code == 255
        assert "bfloat16 is of ai200 only: use -aic-hw-version=ai200" in compiled.err


@pytest.mark.parametrize(("flags", "there"), [([], "ai200"), ([AI200], "ai100")])
def test_a_program_of_the_other_generation_is_refused(
    flags, there, monkeypatch, make_linear, compile_onnx, client, capsys
):
    monkeypatch.setenv("QAIC_SIM_CARD", there)
    program = client(compile_onnx(make_linear(2), *flags).directory, activate=False).program
    assert program.load() == rt.QStatus.QS_UNSUPPORTED
    majors = {"ai100": 2, "ai200": 3}
    assert f"expects:Major Version {5 - majors[there]}" in capsys.readouterr().err


def test_a_generation_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("QAIC_SIM_CARD", "ai300")
    with pytest.raises(RuntimeError, match="QAIC_SIM_CARD is ai100 or ai200, not 'ai300'"):
        device.generation()
