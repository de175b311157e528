# SPDX-License-Identifier: Apache-2.0
"""Local functions and custom operators; the oracle is numpy's own indexing and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from bounds import close, within
from onnx import TensorProto, helper

CLOUD, AISW = "com.qualcomm.cloud", "com.qti.aisw.onnx"
F, I32, I64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
NONE = 2**31 - 1
node = helper.make_node
RNG = np.random.default_rng(7)


def opsets(standard: int = 18, *extra: str):
    return [helper.make_opsetid("", standard), *(helper.make_opsetid(domain, 1) for domain in (CLOUD, AISW, *extra))]


def values(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float16).astype(np.float32)


@pytest.fixture
def run(make_model, compile_onnx, client):
    def run(op, feeds, domain=CLOUD, opset=18, functions=(), rank=None, flags=("-convert-to-fp16",), **attributes):
        kinds = {np.dtype(np.int32): I32, np.dtype(np.int64): I64, np.dtype(np.float32): F}
        inputs = {name: (kinds[value.dtype], list(value.shape)) for name, value in feeds.items()}
        rank = rank or next(iter(feeds.values())).ndim
        m = make_model(
            [node(op, list(inputs), ["y"], domain=domain, **attributes)],
            inputs,
            {"y": (F, [f"dim{i}" for i in range(rank)])},
            opsets=opsets(opset, "my.fn"),
            functions=list(functions),
        )
        compiled = compile_onnx(m, *flags)
        assert compiled.code == 0
        return client(compiled.directory).run(**feeds)["y"]

    return run


POSITIONS = np.array([[0, 2, NONE], [4, NONE, NONE]])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("op", ["CtxScatter", "CtxScatter3D", "CtxScatter3DInt", "CtxScatterCB", "CtxScatterCB3D"])
def test_scatters_without_a_function(op, opset, dtype, run):
    heads = () if "3D" in op else (2,)
    rows = np.array([3, 1]) if "CB" in op else np.array([0, 1])
    cache, updates = values(4 if "CB" in op else 2, *heads, 5, 3), values(2, *heads, 3, 3)
    expected = cache.copy()
    for batch, seq in np.ndindex(2, 3):
        if POSITIONS[batch, seq] != NONE:
            expected[rows[batch], ..., POSITIONS[batch, seq], :] = updates[batch, ..., seq, :]
    feeds = {"cache": cache}
    if "CB" in op:
        feeds["batch_index"] = rows.reshape(2, 1).astype(dtype)
    feeds |= {"position_ids": POSITIONS.astype(dtype), "updates": updates}
    assert np.array_equal(run(op, feeds, opset=opset), expected)


@pytest.mark.parametrize("op", ["CtxGather", "CtxGather3D", "CtxGatherCB", "CtxGatherCB3D"])
@pytest.mark.parametrize("comp_ctx_len", [False, True])
def test_gathers_without_a_function(op, comp_ctx_len, run):
    heads = () if "3D" in op else (2,)
    rows = np.array([3, 1]) if "CB" in op else np.array([0, 1])
    cache = values(4 if "CB" in op else 2, *heads, 5, 3)
    expected = np.array([[0, 1, 4, NONE], [3, NONE, NONE, 0]])
    feeds = {"cache": cache}
    if "CB" in op:
        feeds["batch_index"] = rows.reshape(2, 1)
    feeds["ctx_indices"] = expected if not heads else expected[:, None]
    if comp_ctx_len:
        feeds["comp_ctx_len"] = np.array([4])
    actual = run(op, feeds)
    assert actual.shape == (2, *heads, 4, 3)
    for batch, seq in np.ndindex(2, 4):
        read = actual[batch, ..., seq, :]
        if expected[batch, seq] == NONE:
            assert np.isfinite(read).all()
        else:
            assert np.array_equal(read, cache[rows[batch], ..., expected[batch, seq], :])


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return weight * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)


@pytest.mark.numeric
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("carried", [False, True])
def test_rms_norm_is_one_operator(carried, opset, run):
    """In fp16 the squares would overflow and 1e-6 would be subnormal; the card has one kernel for the operator."""
    x, weight = values(3, 64) * 1000, values(64)
    eps = node("Constant", [], ["eps"])
    eps.attribute.add(name="value_float", ref_attr_name="epsilon", type=1)
    body = [
        node("Mul", ["x", "x"], ["s"]), node("Constant", [], ["shape4"], value_ints=[1, 3, 64, 1]),
        node("Reshape", ["s", "shape4"], ["s4"]), node("GlobalAveragePool", ["s4"], ["m4"]),
        node("Constant", [], ["shape2"], value_ints=[3, 1]), node("Reshape", ["m4", "shape2"], ["m"]), eps,
        node("Add", ["m", "eps"], ["v"]), node("Sqrt", ["v"], ["r"]), node("Div", ["x", "r"], ["n"]),
        node("Mul", ["n", "w"], ["result"]),
    ]  # fmt: skip
    function = helper.make_function(
        AISW, "CustomRMSNorm", ["x", "w"], ["result"], body, opsets(opset)[:1], attributes=["epsilon"]
    )
    functions = [function] if carried else []
    actual = run("CustomRMSNorm", {"x": x, "w": weight}, AISW, opset, functions, epsilon=1e-6)
    expected = rms_norm(x, weight, 1e-6).astype(np.float16).astype(np.float32)
    assert np.isfinite(actual).all()
    within(np.mean(actual != expected), 0.01, "rounded once, but for ties that fall the other way in float32:")
    assert np.abs(actual - expected).max() <= np.spacing(np.abs(expected).max().astype(np.float16))


def test_a_carried_function_wins_over_the_built_in_body(run):
    twice = helper.make_function(CLOUD, "CtxGather", ["a", "b"], ["r"], [node("Add", ["a", "a"], ["r"])], opsets()[:1])
    x = values(2, 2, 3, 1)
    actual = run("CtxGather", {"x": x, "i": np.zeros((2, 1, 3), np.int64)}, functions=[twice])
    assert np.array_equal(actual, 2 * x)


@pytest.mark.numeric
def test_nested_functions_are_inlined(run):
    inner = helper.make_function("my.fn", "Square", ["a"], ["r"], [node("Mul", ["a", "a"], ["r"])], opsets()[:1])
    outer = helper.make_function(
        "my.fn", "Layer", ["x", "w"], ["r"],
        [
            node("Square", ["x"], ["s"], domain="my.fn"),
            node("CustomRMSNorm", ["s", "w"], ["n"], domain=AISW, epsilon=1e-5),
            node("Square", ["n"], ["r"], domain="my.fn"),
        ],
        opsets(18, "my.fn"),
    )  # fmt: skip
    # The squares of s overflow in fp16, unless the norm is still known as one operator.
    x, weight = values(2, 64) * 16, values(64)
    feeds = {"x": x, "w": weight}
    actual = run("Layer", feeds, "my.fn", functions=[inner, outer])
    square = (x * x).astype(np.float16).astype(np.float32)
    norm = rms_norm(square, weight, 1e-5).astype(np.float16).astype(np.float32)
    close(actual, norm * norm, rtol=5e-3, atol=1e-6)
    within(np.mean(actual != (norm * norm).astype(np.float16)), 0.05)


@pytest.mark.parametrize(
    ("domain", "op"), [(CLOUD, "CtxGatherBlockedKV"), (CLOUD, "CtxScatterOwn"), (AISW, "CastToUInt4"), (AISW, "Own")]
)
def test_others_are_refused_by_name(domain, op, make_model, compile_onnx):
    m = make_model([node(op, ["x"], ["y"], domain=domain)], {"x": (F, [2])}, {"y": (F, [2])}, opsets=opsets())
    compiled = compile_onnx(m)
    assert compiled.code == 255
    assert f"[Operator-'{op}', opset_version-18" in compiled.err
    assert f"{domain}::{op}" in compiled.err
    assert not compiled.directory.exists()


def test_a_refusal_inside_of_a_function(make_model, compile_onnx):
    function = helper.make_function("my.fn", "Outer", ["x"], ["r"], [node("Own", ["x"], ["r"], domain=CLOUD)], opsets())
    m = make_model([node("Outer", ["x"], ["y"], domain="my.fn")], {"x": (F, [2])}, {"y": (F, [2])},
                   opsets=opsets(18, "my.fn"), functions=[function])  # fmt: skip
    compiled = compile_onnx(m)
    assert compiled.code == 255
    assert f"{CLOUD}::Own" in compiled.err


def test_old_opsets_need_a_function(make_model, compile_onnx):
    nodes = [node("CustomRMSNorm", ["x", "w"], ["y"], domain=AISW, epsilon=1e-5)]
    m = make_model(nodes, {"x": (F, [2, 4]), "w": (F, [4])}, {"y": (F, [2, 4])}, opsets=opsets(12))
    compiled = compile_onnx(m)
    assert compiled.code == 255
    assert "opset 13" in compiled.err
