# SPDX-License-Identifier: Apache-2.0
"""fp16 mode on what decoders are made of, node by node.

Every value of the graph is an output. Each node is then computed by onnx's reference evaluator from the inputs that
the simulator itself gave it, so an error can not hide behind, or grow from, one further up.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from bounds import within
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
NONE = 2**31 - 1
node = helper.make_node
# Reductions and transcendental functions may fall on the other side of a tie; all else has one right answer.
INEXACT = {"MatMul", "Softmax", "Sin", "Cos", "Exp", "ReduceMean", "Sqrt", "Pow", "Tanh", "Sigmoid", "Erf"}


def half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32) if values.dtype == np.float32 else values


def constant(value: np.ndarray) -> np.ndarray:
    return half(np.clip(value, -65504, 65504)) if value.dtype == np.float32 else value


def scatter_elements(data: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int) -> np.ndarray:
    result = data.copy()
    for place in np.ndindex(*indices.shape):
        if indices[place] != NONE:
            target = list(place)
            target[axis] = indices[place]
            result[tuple(target)] = updates[place]
    return result


def reference(entry, opsets, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    if entry.op_type == "ScatterElements":
        return [scatter_elements(*(inputs[name] for name in entry.input), entry.attribute[0].i)]
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in entry.output]
    single = helper.make_model(helper.make_graph([entry], "n", infos, outputs), opset_imports=opsets)
    with np.errstate(all="ignore"):
        return [np.asarray(result) for result in ReferenceEvaluator(single).run(None, inputs)]


def everything(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return all values from the reference evaluator; only their types and shapes matter here."""
    values = {tensor.name: constant(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    values |= {name: half(value) for name, value in feeds.items()}
    for entry in model.graph.node:
        results = reference(entry, model.opset_import, {name: values[name] for name in entry.input if name})
        values |= {name: half(result) for name, result in zip(entry.output, results, strict=True)}
    return values


@pytest.fixture
def check(compile_onnx, client):
    """Compare the outputs of every node of a model, and return all values of the simulator."""

    def check(m: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = everything(m, feeds)
        del m.graph.output[:]
        for name in (output for entry in m.graph.node for output in entry.output):
            kind = helper.np_dtype_to_tensor_dtype(known[name].dtype)
            m.graph.output.append(helper.make_tensor_value_info(name, kind, list(known[name].shape)))
        compiled = compile_onnx(m, "-convert-to-fp16")
        assert compiled.code == 0
        actual = client(compiled.directory).run(**feeds)
        actual = {name: value.astype(known[name].dtype).reshape(known[name].shape) for name, value in actual.items()}
        values = {**known, **actual}
        for entry in m.graph.node:
            results = reference(entry, m.opset_import, {name: values[name] for name in entry.input if name})
            for name, result in zip(entry.output, results, strict=True):
                compare(entry.op_type, name, values[name], half(result))
        return actual

    return check


def compare(operator: str, name: str, got: np.ndarray, want: np.ndarray) -> None:
    differ = ~((got == want) | (np.isnan(got) & np.isnan(want))) if got.dtype == np.float32 else got != want
    if operator not in INEXACT:
        assert not differ.any(), f"{operator} '{name}': {got[differ][:3]} instead of {want[differ][:3]}"
        return
    # At most the neighbouring fp16 value, and rarely: without rounding nearly all would differ.
    assert np.array_equal(got, half(got), equal_nan=True), name
    within(np.mean(differ), 0.05, name)
    steps = np.spacing(np.maximum(np.abs(want[differ]), 6.2e-5).astype(np.float16)).astype(np.float32)
    assert (np.abs(got[differ] - want[differ]) <= 2 * steps).all(), name


H, D, C, S = 2, 16, 24, 6
POSITIONS = np.array([[0, 1, 2, 17, -1, -1]])


@pytest.fixture
def attention(make_model):
    """One attention layer with rotary embedding, a cache written by position, and a mask from positions."""
    rng = np.random.default_rng(0)
    w = {f"W{part}": (rng.normal(size=(H * D, H * D)) / 6).astype(np.float32) for part in "qkv"}
    w |= {
        "inv": (10000.0 ** (-np.arange(0, D, 2) / D)).astype(np.float32), "last": np.array([-1]),
        "split": np.array([1, S, H, D]), "halves": np.array([D // 2, D // 2]), "zero": np.array(0),
        "none": np.array(NONE), "line": np.array([1, 1, S, 1]), "cube": np.array([1, H, S, D]),
        "slots": np.arange(C), "scale": np.float32(D**-0.5), "low": np.float32(-np.inf), "ok": np.float32(0),
        "lowest": np.float32(np.finfo(np.float32).min), "third": np.float32(1 / 3),
    }  # fmt: skip
    nodes = [
        node("Cast", ["position_ids"], ["at"], to=F),
        node("Unsqueeze", ["at", "last"], ["at_column"]),
        node("Mul", ["at_column", "inv"], ["angle"]),
        node("Concat", ["angle", "angle"], ["angles"], axis=-1),
        node("Sin", ["angles"], ["sin"]),
        node("Cos", ["angles"], ["cos"]),
    ]
    for part in "qkv":
        nodes += [
            node("MatMul", ["x", f"W{part}"], [f"{part}1"]),
            node("Reshape", [f"{part}1", "split"], [f"{part}2"]),
            node("Transpose", [f"{part}2"], [f"{part}3"], perm=[0, 2, 1, 3]),
        ]
    for part in "qk":
        nodes += [
            node("Split", [f"{part}3", "halves"], [f"{part}a", f"{part}b"], axis=-1),
            node("Neg", [f"{part}b"], [f"{part}n"]),
            node("Concat", [f"{part}n", f"{part}a"], [f"{part}r"], axis=-1),
            node("Mul", [f"{part}3", "cos"], [f"{part}c"]),
            node("Mul", [f"{part}r", "sin"], [f"{part}s"]),
            node("Add", [f"{part}c", f"{part}s"], [f"{part}"]),
        ]
    nodes += [
        node("GreaterOrEqual", ["position_ids", "zero"], ["real"]),
        node("Where", ["real", "position_ids", "none"], ["slot"]),
        node("Reshape", ["slot", "line"], ["slot_line"]),
        node("Expand", ["slot_line", "cube"], ["slot_cube"]),
        node("ScatterElements", ["past_key", "slot_cube", "k"], ["key"], axis=2),
        node("ScatterElements", ["past_value", "slot_cube", "v3"], ["value"], axis=2),
        node("Transpose", ["key"], ["key_t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "key_t"], ["scores"]),
        node("Mul", ["scores", "scale"], ["scaled"]),
        node("Unsqueeze", ["position_ids", "last"], ["position_column"]),
        node("LessOrEqual", ["slots", "position_column"], ["seen"]),
        node("Where", ["seen", "scaled", "low"], ["masked"]),
        node("Softmax", ["masked"], ["weight"], axis=-1),
        node("MatMul", ["weight", "value"], ["mixed"]),
        node("Where", ["seen", "ok", "lowest"], ["bias"]),
        node("Add", ["scaled", "bias"], ["masked2"]),
        node("Softmax", ["masked2"], ["weight2"], axis=-1),
        node("Cast", ["real"], ["ones"], to=I64),
        node("Cast", ["real"], ["ones_f"], to=F),
        node("CumSum", ["ones", "axis"], ["count"]),
        node("Mul", ["ones_f", "third"], ["parts"]),
        node("CumSum", ["parts", "axis"], ["sums"]),
    ]
    inputs = {"x": (F, [1, S, H * D]), "position_ids": (I64, [1, S])}
    inputs |= {name: (F, [1, H, C, D]) for name in ("past_key", "past_value")}
    return make_model(nodes, inputs, {"mixed": (F, [1, H, S, D])}, {**w, "axis": np.array(1)})


@pytest.mark.numeric
def test_attention_node_by_node(attention, check):
    rng = np.random.default_rng(1)
    feeds = {"x": rng.normal(size=(1, S, H * D)).astype(np.float32), "position_ids": POSITIONS}
    feeds |= {name: rng.normal(size=(1, H, C, D)).astype(np.float32) for name in ("past_key", "past_value")}
    actual = check(attention, feeds)
    assert actual["masked"].min() == actual["bias"].min() == -65504, "mask constants stay finite"
    for name in ("weight", "weight2"):
        rows = actual[name]
        assert np.array_equal(rows[0, :, 4:], np.full((H, 2, C), np.float32(np.float16(1 / C)))), (
            "fully masked: uniform"
        )
        assert (rows[0, :, 0, 1:] == 0).all()
    untouched = [slot for slot in range(C) if slot not in POSITIONS]
    assert np.array_equal(actual["key"][:, :, untouched], half(feeds["past_key"])[:, :, untouched])
    assert actual["count"].tolist() == [[1, 2, 3, 4, 4, 4]]


@pytest.mark.numeric
def test_positions_beyond_2048_lose_bits(make_model, check):
    """Rotary angles that are computed from float positions are wrong: fp16 cannot represent 4097."""
    m = make_model([node("Cast", ["p"], ["at"], to=F), node("Mul", ["at", "inv"], ["y"])], {"p": (I64, [3])},
                   {"y": (F, [3])}, {"inv": np.float32(0.01)})  # fmt: skip
    assert check(m, {"p": np.array([2047, 2049, 4097])})["at"].tolist() == [2047, 2048, 4096]


@pytest.mark.numeric
def test_rows_masked_by_computed_infinities_are_nan(make_model, check):
    """Only constants are clipped; a mask of -inf that the graph computes gives NaN on a fully masked row."""
    nodes = [
        node("Mul", ["mask", "low"], ["big"]),
        node("Mul", ["big", "two"], ["bias"]),
        node("Add", ["x", "bias"], ["s"]),
        node("Softmax", ["s"], ["y"], axis=-1),
    ]
    m = make_model(nodes, {"x": (F, [2, 4]), "mask": (F, [2, 4])}, {"y": (F, [2, 4])},
                   {"low": np.float32(-65504), "two": np.float32(2)})  # fmt: skip
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], np.float32)
    # 0 * inf does not occur: the mask is multiplied in steps.
    actual = check(m, {"x": np.ones((2, 4), np.float32), "mask": mask})
    assert actual["y"][0].tolist() == [0.5, 0.5, 0, 0]
    assert np.isnan(actual["y"][1]).all()


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter_nd_moves_unless_it_adds(reduction, make_model, compile_onnx, client):
    x = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)
    updates = np.random.default_rng(3).normal(size=(2, 8)).astype(np.float32)
    nodes = [node("ScatterND", ["x", "i", "u"], ["y"], reduction=reduction)]
    m = make_model(nodes, {"x": (F, [4, 8]), "i": (I64, [2, 1]), "u": (F, [2, 8])}, {"y": (F, [4, 8])})
    actual = client(compile_onnx(m, "-convert-to-fp16").directory).run(x=x, i=np.array([[2], [NONE]]), u=updates)["y"]
    expected = half(x)
    expected[2] = half(updates[0]) if reduction == "none" else half(expected[2] + half(updates[0]))
    assert np.array_equal(actual, expected)


@pytest.mark.numeric
def test_gated_feed_forward_and_norm(make_model, check):
    rng = np.random.default_rng(4)
    weights = {f"W{part}": (rng.normal(size=(32, 32)) / 6).astype(np.float32) for part in "gud"}
    weights |= {"two": np.float32(2), "eps": np.float32(1e-5), "g": rng.normal(size=32).astype(np.float32),
                "last": np.array([-1])}  # fmt: skip
    nodes = [
        node("Pow", ["x", "two"], ["square"]),
        node("ReduceMean", ["square", "last"], ["mean"]),
        node("Add", ["mean", "eps"], ["shifted"]),
        node("Sqrt", ["shifted"], ["root"]),
        node("Div", ["x", "root"], ["unit"]),
        node("Mul", ["unit", "g"], ["normed"]),
        node("MatMul", ["normed", "Wg"], ["gate"]),
        node("Sigmoid", ["gate"], ["open"]),
        node("Mul", ["gate", "open"], ["silu"]),
        node("MatMul", ["normed", "Wu"], ["up"]),
        node("Mul", ["silu", "up"], ["inner"]),
        node("MatMul", ["inner", "Wd"], ["down"]),
        node("Add", ["x", "down"], ["y"]),
        node("Clip", ["y", "low", "high"], ["clipped"]),
        node("ReduceMax", ["clipped", "last"], ["top"]),
        node("Abs", ["clipped"], ["size"]),
    ]
    weights |= {"low": np.float32(-0.3), "high": np.float32(0.3)}
    m = make_model(nodes, {"x": (F, [40, 32])}, {"y": (F, [40, 32])}, weights)
    actual = check(m, {"x": rng.normal(size=(40, 32)).astype(np.float32)})
    assert np.array_equal(actual["clipped"], half(actual["clipped"]))


@pytest.mark.numeric
@pytest.mark.parametrize("flags", [(), ("-convert-to-fp16",)], ids=["plain", "fp16"])
def test_models_in_half_precision_round_between_nodes(flags, make_model, compile_onnx, client):
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(4, 64)).astype(np.float16), (rng.normal(size=(64, 64)) / 8).astype(np.float16)
    nodes = [
        node("MatMul", ["x", "W"], ["m"]),
        node("Mul", ["m", "m"], ["s"]),
        node("Exp", ["s"], ["e"]),
        node("Sqrt", ["e"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[1, 0]),
        node("Sub", ["t", "one"], ["y"]),
        node("Cast", ["y"], ["z"], to=F),
    ]
    half_type = TensorProto.FLOAT16
    m = make_model(nodes, {"x": (half_type, [4, 64])}, {"y": (half_type, [64, 4]), "z": (F, [64, 4])},
                   {"W": w, "one": np.float16(1)})  # fmt: skip
    compiled = compile_onnx(m, *flags)
    actual = client(compiled.directory).run(x=x)
    product = half(x.astype(np.float32) @ w.astype(np.float32))
    expected = half(half(np.sqrt(half(np.exp(half(product * product))))) - 1).T
    within(np.mean(actual["y"] != expected), 0.02)
    assert np.array_equal(actual["y"], actual["z"])
    exact = half(np.sqrt(np.exp(product * product)) - 1).T
    assert np.mean(exact != expected) > 0.2, "rounding between nodes must matter"
    # A weight in half precision stays one in the file.
    assert compiled.file.stat().st_size < 1.1 * w.nbytes + 16384
