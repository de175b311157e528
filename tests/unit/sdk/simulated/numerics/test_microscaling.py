# SPDX-License-Identifier: Apache-2.0
"""MXFP6 weights and MXINT8 state; the oracle is `microscaling`, whose elements are those of ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bounds import close
from microscaling import mxfp6, mxint8
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qeff_validate.sdk.simulated import qpc, weights
from qeff_validate.sdk.simulated.numerics import microscaling, mxfp6_weights

F, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
node = helper.make_node
RNG = np.random.default_rng(3)


def spread(*shape: int) -> np.ndarray:
    """Values of very different magnitude, with ties and a block of zeros."""
    values = RNG.normal(size=shape) * np.exp2(RNG.integers(-6, 6, shape))
    values.reshape(-1)[::7] = np.round(values.reshape(-1)[::7] * 16) / 16
    values[..., 0] = 0
    return values.astype(np.float32)


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(64, 5), (70, 40), (3, 33, 8), (1, 7)])
def test_mxfp6_is_that_of_ml_dtypes(shape, axis):
    values = spread(*shape)
    assert np.array_equal(microscaling.mxfp6(values, axis), mxfp6(values, axis))


def test_every_element_of_e2m3_is_kept_and_every_tie_goes_to_even():
    elements = np.arange(64, dtype=np.uint8).view(ml_dtypes.float6_e2m3fn).astype(np.float32)
    for block in (elements[:32], elements[32:]):
        assert np.array_equal(microscaling.mxfp6(block, 0), block)
    middles = (elements[:31] + elements[1:32]) / 2
    block = np.concatenate([middles, [7.5]]).astype(np.float32)
    assert np.array_equal(microscaling.mxfp6(block, 0)[:31], middles.astype(ml_dtypes.float6_e2m3fn).astype(np.float32))
    assert microscaling.mxfp6(np.array([7.99, -7.99], np.float32), 0).tolist() == [7.5, -7.5], "saturates"


@pytest.mark.parametrize("power", [-126, -20, 0, 13, 127])
def test_the_scale_is_exact_at_powers_of_two(power):
    block = np.ldexp(np.array([1, -0.99, 0.3], np.float32), power)
    assert np.array_equal(microscaling.mxfp6(block, 0), mxfp6(block, 0))
    assert np.array_equal(microscaling.mxint8(block), mxint8(block))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_damaged_is_nan_and_its_neighbours_are_not(bad):
    values = spread(3, 64)
    values[1, 40] = bad
    for rounded in (microscaling.mxfp6(values, 1), microscaling.mxint8(values)):
        assert np.isnan(rounded[1, 32:]).all()
        assert np.isfinite(rounded).sum() == values.size - 32


@pytest.mark.parametrize("width", [8, 32, 33, 64, 80])
def test_mxint8_in_the_graph(width):
    """Against the reference evaluator and against known values; fp16 values, as in a graph in fp16."""
    values = half(spread(2, 3, 4, width) * np.exp2(RNG.integers(-14, 10, (2, 3, 4, 1))))
    values[0, 0, 0] = 0
    values[0, 0, 1] = np.ldexp(1.0, -24)
    values[0, 1, 0, :2] = [65504, -8]
    nodes, constants = microscaling.mxint8_nodes("x", "y", width)
    infos = [helper.make_tensor_value_info(name, F, list(values.shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(model)
    (actual,) = ReferenceEvaluator(model).run(None, {"x": values})
    assert np.array_equal(actual, mxint8(values))
    assert np.array_equal(microscaling.mxint8(values), mxint8(values))
    assert np.array_equal(half(actual), actual), "fp16 holds what MXINT8 leaves of fp16 numbers"
    assert np.array_equal(mxint8(actual), actual), "a second time changes nothing"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_number_shows_in_the_graph_wherever_it_stands(bad):
    """ONNX Runtime's ReduceMax loses some NaNs."""
    values = np.tile(spread(1, 64), (64, 1))
    np.fill_diagonal(values, bad)
    nodes, constants = microscaling.mxint8_nodes("x", "y", 64)
    infos = [helper.make_tensor_value_info(name, F, [64, 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (actual,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": values})
    for row, blocks in enumerate(actual.reshape(64, 2, 32)):
        assert np.isnan(blocks[row // 32]).all()
        assert np.isfinite(blocks[1 - row // 32]).all()


X = RNG.normal(size=(4, 64)).astype(np.float32)
TRANSPOSED = node("MatMul", ["x", "t"], ["y"])


def products(compile_onnx, client, model, *flags: str, x: np.ndarray = X) -> dict[str, np.ndarray]:
    compiled = compile_onnx(model, "-mxfp6-matmul", *flags)
    assert compiled.code == 0
    return client(compiled.directory).run(x=x)


@pytest.mark.numeric
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("flags", [[], ["-convert-to-fp16"]])
def test_a_weight_is_compressed_along_what_is_summed_over(small, flags, make_model, compile_onnx, client):
    columns = 2 if small else 48
    weight = spread(64, columns)
    model = make_model(
        [node("MatMul", ["x", "W"], ["y"])], {"x": (F, [4, 64])}, {"y": (F, [4, columns])}, {"W": weight}
    )
    actual = products(compile_onnx, client, model, *flags)["y"]
    x, w = (half(X), half(mxfp6(weight, 0))) if flags else (X, mxfp6(weight, 0))
    expected = x.astype(np.float64) @ w.astype(np.float64)
    close(actual, expected, rtol=2e-3 if flags else 1e-5, atol=3e-2 if flags else 2e-4)
    other = x.astype(np.float64) @ (half(mxfp6(weight, 1)) if flags else mxfp6(weight, 1)).astype(np.float64)
    assert np.abs(actual - other).max() > 0.1, "blocks along the other axis are others"


IDENTITY = np.eye(64, dtype=np.float32)


@pytest.mark.parametrize(
    ("nodes", "shape", "axis", "read"),
    [
        ([node("MatMul", ["x", "W"], ["y"])], (64, 40), 0, lambda w: w),
        ([node("Gemm", ["x", "W"], ["y"])], (64, 40), 0, lambda w: w),
        ([node("Gemm", ["x", "W"], ["y"], transB=1)], (40, 64), 1, lambda w: w.T),
        ([node("Transpose", ["W"], ["t"]), TRANSPOSED], (40, 64), 1, lambda w: w.T),
        (
            [node("Identity", ["W"], ["i"]), node("Transpose", ["i"], ["t"], perm=[1, 0]), TRANSPOSED],
            (40, 64), 1, lambda w: w.T,
        ),
    ],
)  # fmt: skip
def test_which_axis(nodes, shape, axis, read, make_model, compile_onnx, client):
    weight = spread(*shape)
    model = make_model(nodes, {"x": (F, [64, 64])}, {"y": (F, [64, 40])}, {"W": weight})
    actual = products(compile_onnx, client, model, x=IDENTITY)["y"]
    assert np.array_equal(actual, read(mxfp6(weight, axis))), "a unit matrix reads the weight itself"


def test_a_weight_on_the_left(make_model, compile_onnx, client):
    weight = spread(40, 64)
    model = make_model([node("MatMul", ["W", "x"], ["y"])], {"x": (F, [64, 64])}, {"y": (F, [40, 64])}, {"W": weight})
    assert np.array_equal(products(compile_onnx, client, model, x=IDENTITY)["y"], mxfp6(weight, 1))


def test_half_precision_weights(make_model, compile_onnx, client):
    weight = spread(64, 40).astype(np.float16)
    model = make_model(
        [node("MatMul", ["x", "W"], ["y"])], {"x": (F16, [64, 64])}, {"y": (F16, [64, 40])}, {"W": weight}
    )
    actual = products(compile_onnx, client, model, x=IDENTITY.astype(np.float16))["y"]
    assert np.array_equal(actual, mxfp6(weight.astype(np.float32), 0))


@pytest.mark.numeric
def test_others_read_the_weight_as_it_is(make_model, compile_onnx, client):
    """A tied embedding: a table for Gather, and transposed for MatMul."""
    table = spread(40, 64)
    nodes = [
        node("Gather", ["W", "rows"], ["e"]),
        node("Transpose", ["W"], ["t"]),
        node("MatMul", ["x", "t"], ["y"]),
        node("Add", ["t", "t"], ["u"]),
        node("Conv", ["c", "K"], ["v"]),
    ]
    kernel = spread(2, 2, 3)
    inputs = {"x": (F, [64, 64]), "c": (F, [1, 2, 8])}
    outputs = {"e": (F, [3, 64]), "y": (F, [64, 40]), "u": (F, [64, 40]), "v": (F, [1, 2, 6])}
    model = make_model(nodes, inputs, outputs, {"W": table, "rows": np.array([0, 5, 39]), "K": kernel})
    compiled = compile_onnx(model, "-mxfp6-matmul")
    signal = spread(1, 2, 8)
    actual = client(compiled.directory).run(x=IDENTITY, c=signal)
    assert np.array_equal(actual["e"], table[[0, 5, 39]])
    assert np.array_equal(actual["y"], mxfp6(table, 1).T)
    assert np.array_equal(actual["u"], 2 * table.T)
    (conv,) = ReferenceEvaluator(make_model([nodes[-1]], {"c": inputs["c"]}, {"v": outputs["v"]}, {"K": kernel})).run(
        None, {"c": signal}
    )
    close(actual["v"], conv, rtol=1e-4, atol=1e-4, what="only MatMul and Gemm are compressed:")


def test_a_weight_is_stored_once(make_model, compile_onnx):
    weight = spread(64, 64)
    nodes = [node("Transpose", ["W"], ["t"]), node("MatMul", ["x", "t"], ["h"]), node("MatMul", ["h", "t"], ["y"])]
    model = make_model(nodes, {"x": (F, [4, 64])}, {"y": (F, [4, 64])}, {"W": weight})
    plain, packed = compile_onnx(model), compile_onnx(model, "-mxfp6-matmul", name="mx")
    assert abs(packed.file.stat().st_size - plain.file.stat().st_size) < 1024
    graph = onnx.load_from_string(qpc.read(packed.directory).network).graph
    assert [tensor.name for tensor in graph.initializer] == ["W/sim.mxfp6.1"]
    assert len([entry for entry in graph.node if entry.op_type == "Transpose"]) == 1


def test_nodes_that_are_named_to_be_in_float32_keep_their_weights(make_model, compile_onnx, client, tmp_path):
    weight = spread(64, 40)
    nodes = [node("MatMul", ["x", "W"], ["y"]), node("MatMul", ["x", "W"], ["z"])]
    model = make_model(nodes, {"x": (F, [64, 64])}, {name: (F, [64, 40]) for name in "yz"}, {"W": weight})
    (tmp_path / "npi.yaml").write_text("FP32NodeInstanceNames: [z]")
    for flags in ([], ["-convert-to-fp16"]):
        compiled = compile_onnx(
            model, "-mxfp6-matmul", f"-node-precision-info={tmp_path / 'npi.yaml'}", *flags, name=f"q{len(flags)}"
        )
        actual = client(compiled.directory).run(x=IDENTITY)
        assert np.array_equal(actual["y"], mxfp6(weight, 0))
        # a weight of this size is in one form for all who read it, so fp16 rounds it here
        assert np.array_equal(actual["z"], weight)


@pytest.mark.parametrize(
    ("dims", "axis"), [((100, 7), 0), ((7, 100), 1), ((3, 70, 4), 1), ((5, 40), 0), ((2, 3, 65), 2)]
)
@pytest.mark.parametrize("chunk", [64, 4096, 1 << 20])
def test_streaming_in_pieces_changes_nothing(dims, axis, chunk, monkeypatch):
    """Chunks do not end at block borders, and pieces may be smaller than a row of the weight."""
    values = spread(*dims)
    data = values.tobytes()
    monkeypatch.setattr(mxfp6_weights, "CHUNK", chunk)
    source = weights.Weight("W", F, len(data), lambda: (data[at : at + 97] for at in range(0, len(data), 97)))
    pieces = list(mxfp6_weights._stream(source, dims, axis)())
    assert np.array_equal(np.frombuffer(b"".join(pieces), np.float32).reshape(dims), mxfp6(values, axis))
    least = 32 * int(np.prod(dims[axis + 1 :])) * 4
    assert max(map(len, pieces)) <= max(chunk, least), "never more than a chunk, or a row of blocks, at once"


STATE = (1, 2, 6, 40)
PAIR = """
- {IOName: past, Precision: mxint8}
- {IOName: past_RetainedState, Precision: mxint8}
"""


def cached(make_model, operator: str, *, kind: int = F, between: bool = False):
    """A cache of six rows, written at `at`, and read in the same run."""
    rows = {"ScatterND": ["past0", "at", "new"], "Add": ["past0", "new"]}[operator]
    nodes = [
        node(
            "Transpose" if between else "Identity", ["past"], ["past0"], **({"perm": [0, 1, 2, 3]} if between else {})
        ),
        node(operator, rows, ["written"]),
        node("Identity", ["written"], ["past_RetainedState"]),
        node("Mul", ["written", "one"], ["y"]),
    ]
    inputs = {"past": (kind, STATE), "new": (kind, (1, 2, 1, 40) if operator == "ScatterND" else STATE)}
    inputs |= {"at": (TensorProto.INT64, (1, 2, 1, 3))} if operator == "ScatterND" else {}
    outputs = {"past_RetainedState": (kind, STATE), "y": (kind, STATE)}
    scalar = np.array(1, np.float16 if kind == F16 else np.float32)
    return make_model(nodes, inputs, outputs, {"one": scalar})


@pytest.mark.parametrize("kind", [F, F16])
@pytest.mark.parametrize("between", [True, False])
def test_new_rows_of_a_cache_are_compressed_when_written(kind, between, make_model, compile_onnx, client):
    model = cached(make_model, "ScatterND", kind=kind, between=between)
    compiled = compile_onnx(model, "-retained-state", *(["-convert-to-fp16"] if kind == F else []), custom_io=PAIR)
    assert compiled.code == 0
    assert [b.type for b in compiled.desc.selected_set.bindings if b.name.startswith("past")] == [1, 1]
    past, new = spread(*STATE).astype(np.float16), half(spread(1, 2, 1, 40))
    at = np.array([[[0, h, 4]] for h in (0, 1)]).reshape(1, 2, 1, 3)
    run = client(compiled.directory)
    actual = run.run(past=past, new=new.astype(np.float16 if kind == F16 else np.float32), at=at)
    expected = mxint8(past.astype(np.float32))
    expected[:, :, 4] = mxint8(new)[:, :, 0]
    assert np.array_equal(actual["past_RetainedState"], expected), "what a client writes is compressed as well"
    assert np.array_equal(actual["y"], expected), "and is read so in the same run"
    later = run.run(past=np.empty(0, np.float16), new=np.zeros_like(new).astype(actual["y"].dtype), at=at)
    assert np.array_equal(later["past_RetainedState"][:, :, :4], expected[:, :, :4]), "what is kept is kept as it is"
    graph = onnx.load_from_string(qpc.read(compiled.directory).network).graph
    (at,) = [entry for entry in graph.node if entry.op_type == "Round"]
    assert "sim.rows" in at.name, "only what is new is compressed"


def test_a_state_that_is_computed_is_compressed_whole(make_model, compile_onnx, client):
    compiled = compile_onnx(cached(make_model, "Add"), "-retained-state", "-convert-to-fp16", custom_io=PAIR)
    past, new = spread(*STATE).astype(np.float16), half(spread(*STATE))
    actual = client(compiled.directory).run(past=past, new=new)
    expected = mxint8(half(mxint8(past.astype(np.float32)) + new))
    assert np.array_equal(actual["past_RetainedState"], expected)
    assert np.array_equal(actual["y"], expected)
    graph = onnx.load_from_string(qpc.read(compiled.directory).network).graph
    assert sum(entry.op_type == "Round" for entry in graph.node) == 1


def test_both_of_a_pair_are_mxint8_or_neither(make_model, compile_onnx):
    model = cached(make_model, "Add")
    one = "- {IOName: past, Precision: mxint8}\n- {IOName: past_RetainedState, Precision: float16}"
    for text in (one, one.replace("float16", "mxint8").replace("mxint8", "float16", 1)):
        compiled = compile_onnx(model, "-retained-state", custom_io=text)
        assert compiled.code == 255
        assert "must have one type" in compiled.err
    alone = compile_onnx(model, custom_io=PAIR)
    assert alone.code == 255
    assert "for retained state only" in alone.err
