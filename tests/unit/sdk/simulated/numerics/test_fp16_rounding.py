# SPDX-License-Identifier: Apache-2.0
"""fp16 mode against an oracle that shares no code with it: onnx's reference evaluator, rounded per node."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from bounds import within
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qeff_validate.sdk.simulated.numerics import fp16_rounding

F = TensorProto.FLOAT
node = helper.make_node


def half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16).astype(np.float32) if values.dtype == np.float32 else values


def oracle(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, rounded: bool = True) -> dict[str, np.ndarray]:
    """Run each node separately, on fp16 values stored as float32, and round its outputs."""
    rounding = half if rounded else np.asarray

    def constant(value: np.ndarray) -> np.ndarray:
        return rounding(np.clip(value, -65504, 65504).astype(np.float32) if value.dtype == np.float32 else value)

    values = {tensor.name: constant(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    values |= {name: rounding(value) for name, value in feeds.items()}
    for entry in model.graph.node:
        needed = {name: values[name] for name in entry.input if name}
        types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in needed.items()}
        infos = [helper.make_tensor_value_info(name, element, None) for name, element in types.items()]
        outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in entry.output]
        graph = helper.make_graph([entry], "n", infos, outputs)
        single = helper.make_model(graph, opset_imports=model.opset_import)
        with np.errstate(over="ignore", invalid="ignore"):
            results = ReferenceEvaluator(single).run(None, needed)
        finish = constant if entry.op_type == "Constant" else rounding
        values |= {name: finish(np.asarray(result)) for name, result in zip(entry.output, results, strict=True)}
    return {info.name: values[info.name] for info in model.graph.output}


@pytest.fixture
def mlp(make_model):
    rng = np.random.default_rng(1)
    weights = {
        "W1": rng.normal(size=(32, 64)),
        "b1": rng.normal(size=64),
        "g": rng.normal(size=64),
        "c": rng.normal(size=64),
        "W2": rng.normal(size=(64, 32)) / 8,
        "s": np.array(0.70710678),
        "one": np.array(1.0),
        "h": np.array(0.5),
    }
    nodes = [
        node("MatMul", ["x", "W1"], ["m1"]),
        node("Add", ["m1", "b1"], ["a1"]),
        node("LayerNormalization", ["a1", "g", "c"], ["n1"], epsilon=1e-5),
        node("Mul", ["n1", "s"], ["e0"]),
        node("Erf", ["e0"], ["e1"]),
        node("Add", ["e1", "one"], ["e2"]),
        node("Mul", ["n1", "e2"], ["e3"]),
        node("Mul", ["e3", "h"], ["gelu"]),
        node("MatMul", ["gelu", "W2"], ["m2"]),
        node("Softmax", ["m2"], ["y"], axis=-1),
    ]
    weights = {k: v.astype(np.float32) for k, v in weights.items()}
    return make_model(nodes, {"x": (F, ["n", 32])}, {"y": (F, ["n", 32]), "m2": (F, ["n", 32])}, weights)


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """Distance in units in the last place of fp16."""
    unit = np.spacing(np.maximum(np.abs(want), 6.1e-5).astype(np.float16)).astype(np.float32)
    return float(np.max(np.abs(got - want) / unit))


@pytest.mark.numeric
def test_mlp_rounds_as_the_oracle_does(mlp, compile_onnx, client):
    x = np.random.default_rng(2).normal(size=(3, 32)).astype(np.float32)
    compiled = compile_onnx(mlp, "-convert-to-fp16", "-onnx-define-symbol=n,3")
    actual = client(compiled.directory).run(x=x)
    expected, exact = oracle(mlp, {"x": x}), oracle(mlp, {"x": x}, rounded=False)
    for name in ("m2", "y"):
        assert np.array_equal(actual[name], half(actual[name])), "outputs must be fp16 values"
        assert actual[name].dtype == np.float32
        # fp32 sums in another order may tip a rounding or two; without rounding the distance is far larger.
        within(np.mean(actual[name] != expected[name]), 0.1)
        within(ulps(actual[name], expected[name]), 8)
    assert np.mean(half(exact["m2"]) != expected["m2"]) > 0.5
    assert np.abs(exact["y"] - expected["y"]).max() > 10 * np.abs(actual["y"] - expected["y"]).max()


def test_exact_arithmetic_agrees_bit_for_bit(make_model, compile_onnx, client):
    """Elementwise arithmetic has one correct result per node, so no bit may differ."""
    nodes = [
        node("Mul", ["x", "k"], ["a"]),
        node("Add", ["a", "x"], ["b"]),
        node("Sub", ["b", "k"], ["c"]),
        node("Reshape", ["c", "shape"], ["d"]),
        node("Div", ["d", "k3"], ["e"]),
        node("Concat", ["e", "d"], ["f"], axis=0),
        node("Mul", ["f", "f"], ["y"]),
    ]
    weights = {
        "k": np.float32(0.1), "k3": np.float32(3.3), "shape": np.array([-1]),
    }  # fmt: skip
    m = make_model(nodes, {"x": (F, [64, 8])}, {"y": (F, ["rows"])}, weights)
    x = (np.random.default_rng(3).normal(size=(64, 8)) * np.logspace(-6, 2, 8)).astype(np.float32)
    compiled = compile_onnx(m, "-convert-to-fp16")
    actual, expected = client(compiled.directory).run(x=x)["y"], oracle(m, {"x": x})["y"]
    assert np.array_equal(actual, expected)
    assert np.any((np.abs(expected) < 6.1e-5) & (expected != 0)), "subnormals must take part"
    assert not np.array_equal(half(oracle(m, {"x": x}, rounded=False)["y"]), expected), "rounding per node must matter"


def test_mask_constants_are_clipped_and_stay_finite(make_model, compile_onnx, client):
    nodes = [
        node("Sub", ["one", "mask"], ["inverse"]),
        node("Mul", ["inverse", "low"], ["bias"]),
        node("Add", ["x", "bias"], ["s"]),
        node("Softmax", ["s"], ["y"], axis=-1),
    ]
    lowest = np.float32(-3.4028235e38)
    m = make_model(
        nodes,
        {"x": (F, [2, 4]), "mask": (F, [2, 4])},
        {"y": (F, [2, 4]), "bias": (F, [2, 4])},
        {"one": np.float32(1), "low": lowest},
    )
    feeds = {"x": np.ones((2, 4), np.float32), "mask": np.array([[1, 1, 0, 0], [0, 0, 0, 0]], np.float32)}
    actual = client(compile_onnx(m, "-convert-to-fp16").directory).run(**feeds)
    assert actual["bias"].min() == -65504
    assert np.array_equal(actual["y"], oracle(m, feeds)["y"])
    assert np.array_equal(actual["y"][1], np.full(4, 0.25, np.float32)), "a fully masked row is uniform, not NaN"
    plain = client(compile_onnx(m, name="fp32").directory).run(**feeds)
    assert plain["bias"].min() == lowest, "without -convert-to-fp16 nothing is clipped"


@pytest.mark.parametrize("attribute", ["value", "value_float", "value_floats"])
def test_constant_nodes_are_clipped(attribute, make_model, compile_onnx, client):
    values = {
        "value": numpy_helper.from_array(np.array([-np.inf], np.float32)),
        "value_float": -3.4e38,
        "value_floats": [-3.4e38],
    }
    nodes = [node("Constant", [], ["c"], **{attribute: values[attribute]}), node("Mul", ["x", "c"], ["y"])]
    m = make_model(nodes, {"x": (F, [1])}, {"y": (F, [1])})
    assert client(compile_onnx(m, "-convert-to-fp16").directory).run(x=np.ones(1, np.float32))["y"] == -65504


def test_constant_of_shape_is_clipped(make_model, compile_onnx, client):
    fill = numpy_helper.from_array(np.array([-3.4e38], np.float32))
    nodes = [node("ConstantOfShape", ["s"], ["c"], value=fill), node("Add", ["x", "c"], ["y"])]
    m = make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])}, {"s": np.array([2])})
    assert client(compile_onnx(m, "-convert-to-fp16").directory).run(x=np.zeros(2, np.float32))["y"][0] == -65504


def test_computed_overflow_becomes_infinite(make_model, compile_onnx, client):
    nodes = [node("Mul", ["x", "x"], ["square"]), node("Div", ["square", "x"], ["y"])]
    m = make_model(nodes, {"x": (F, [3])}, {"y": (F, [3])})
    x = np.array([300, -300, 100], np.float32)
    fp16 = client(compile_onnx(m, "-convert-to-fp16").directory).run(x=x)["y"]
    assert np.array_equal(fp16, np.array([np.inf, -np.inf, 100], np.float32))
    assert np.array_equal(fp16, oracle(m, {"x": x})["y"])
    assert np.array_equal(client(compile_onnx(m, name="fp32").directory).run(x=x)["y"], x)


def test_nan_and_infinity_propagate(make_linear, compile_onnx, client):
    x = np.ones((2, 32), np.float32)
    x[0, 3] = np.nan
    c = client(compile_onnx(make_linear(2), "-convert-to-fp16").directory)
    y = c.run(x=x)["y"]
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
    x[0, 3] = 1e6
    assert not np.isfinite(c.run(x=x)["y"][0]).any(), "an input above 65504 is infinite on the card"


def test_nan_weights_are_kept():
    actual = fp16_rounding.clip_and_round(np.array([np.nan, np.inf, -np.inf, 1e-9, 1 / 3], np.float32))
    assert np.isnan(actual[0])
    assert actual[1:].tolist() == [65504.0, -65504.0, 0.0, float(np.float16(1 / 3))]


def test_large_weights_are_rounded_while_they_are_streamed(make_linear, compile_onnx, client):
    m = make_linear(4)
    x = np.eye(4, 32, dtype=np.float32)
    actual = client(compile_onnx(m, "-convert-to-fp16").directory).run(x=x)["y"]
    assert np.array_equal(actual, oracle(m, {"x": x})["y"])


def test_subgraphs_are_rounded(make_model, compile_onnx, client):
    def branch(name: str, *nodes):
        return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(f"{name}_y", F, None)])

    then = branch("t", node("Mul", ["x", "k"], ["t_a"]), node("Mul", ["t_a", "k"], ["t_y"]))
    other = branch("e", node("Add", ["x", "k"], ["e_y"]))
    nodes = [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
    m = make_model(nodes, {"x": (F, [64]), "flag": (TensorProto.BOOL, [])}, {"y": (F, [64])}, {"k": np.float32(0.1)})
    x = np.random.default_rng(5).normal(size=64).astype(np.float32)
    c = client(compile_onnx(m, "-convert-to-fp16").directory)
    k = half(np.float32(0.1))
    assert np.array_equal(c.run(x=x, flag=np.array([1], np.int8))["y"], half(half(half(x) * k) * k))
    assert np.array_equal(c.run(x=x, flag=np.array([0], np.int8))["y"], half(half(x) + k))


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_opsets(opset, make_model, compile_onnx, client):
    m = make_model(
        [node("Mul", ["x", "k"], ["y"])],
        {"x": (F, [8])},
        {"y": (F, [8])},
        {"k": np.float32(0.3)},
        opset=opset,
    )
    x = np.linspace(0.1, 9, 8, dtype=np.float32)
    actual = client(compile_onnx(m, "-convert-to-fp16").directory).run(x=x)["y"]
    assert np.array_equal(actual, oracle(m, {"x": x})["y"])


def test_unknown_types_are_refused(make_model, compile_onnx):
    attributes = {"K": 16, "N": 2, "bits": 4, "block_size": 16, "name": "product"}
    m = make_model([node("MatMulNBits", ["x", "q", "s"], ["h"], domain="com.microsoft", **attributes),
                    node("Neg", ["h"], ["y"])],
                   {"x": (F, [2, 16]), "s": (F, [2])}, {"y": (F, [2, 2])},
                   {"q": np.ones((2, 1, 8), np.uint8)})  # fmt: skip
    compiled = compile_onnx(m, "-convert-to-fp16")
    assert compiled.code == 255
    assert "'h', output of node 'product' (com.microsoft::MatMulNBits)" in compiled.err
    assert "value_info" in compiled.err
