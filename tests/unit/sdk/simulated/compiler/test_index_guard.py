# SPDX-License-Identifier: Apache-2.0
"""INT32_MAX as an index: writes are dropped, reads return slot 0. The oracle is a loop over numpy arrays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qeff_validate.sdk.simulated import qpc
from qeff_validate.sdk.simulated.bindings import qaicrt as rt

F, I32, I64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
NONE = 2**31 - 1
node = helper.make_node
COMBINE = {"none": lambda _, new: new, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def scatter_nd(data: np.ndarray, indices: np.ndarray, updates: np.ndarray, how: str = "none") -> np.ndarray:
    result = data.copy()
    for place in np.ndindex(*indices.shape[:-1]):
        target = tuple(indices[place])
        if NONE not in target:
            result[target] = COMBINE[how](result[target], updates[place])
    return result


def scatter_elements(data, indices, updates, axis: int, how: str = "none") -> np.ndarray:
    result = data.copy()
    for place in np.ndindex(*indices.shape):
        if indices[place] != NONE:
            target = list(place)
            target[axis] = indices[place]
            result[tuple(target)] = COMBINE[how](result[tuple(target)], updates[place])
    return result


@pytest.fixture
def run(make_model, compile_onnx, client):
    """Compile and run one node; indices are an input, a constant, or computed from an input by Where."""

    def run(op: str, data, indices, updates=None, source="input", opset=18, **attributes):
        kinds = {np.dtype(np.int32): I32, np.dtype(np.int64): I64, np.dtype(np.float32): F}
        feeds = {"data": data} | ({} if updates is None else {"updates": updates})
        weights, nodes, name = {}, [], "indices"
        if source == "constant":
            weights["indices"] = indices
        elif source == "computed":
            # As decoders make it: slots where they are valid, INT32_MAX elsewhere.
            feeds["slots"], feeds["valid"] = (
                np.where(indices == NONE, 0, indices).astype(indices.dtype),
                indices != NONE,
            )
            weights["none"] = np.array(NONE, indices.dtype)
            nodes.append(node("Where", ["valid", "slots", "none"], ["chosen"]))
            name = "chosen"
        else:
            feeds["indices"] = indices
        nodes.append(node(op, ["data", name, *(["updates"] if updates is not None else [])], ["y"], **attributes))
        inputs = {k: (kinds.get(v.dtype, TensorProto.BOOL), list(v.shape)) for k, v in feeds.items()}
        rank = {"Gather": data.ndim + indices.ndim - 1, "GatherElements": indices.ndim, "GatherND": 1}.get(
            op, data.ndim
        )
        m = make_model(nodes, inputs, {"y": (F, [f"dim{i}" for i in range(rank)])}, weights, opset=opset)
        compiled = compile_onnx(m, "-convert-to-fp16")
        assert compiled.code == 0
        feeds = {k: v.astype(np.int8) if v.dtype == bool else v for k, v in feeds.items()}
        return client(compiled.directory).run(**feeds)["y"]

    return run


DATA = np.arange(24, dtype=np.float32).reshape(4, 6)
SOURCES = pytest.mark.parametrize("source", ["input", "constant", "computed"])


@SOURCES
def test_scatter_nd_rows_are_dropped(source, run):
    rng = np.random.default_rng(0)
    # Batch and slot, as a KV cache is written; slot 0 is written too, so a write moved there would show.
    cache = rng.normal(size=(2, 5, 3)).astype(np.float16).astype(np.float32)
    indices = np.array([[[0, 0], [0, NONE], [0, 3]], [[1, NONE], [1, 0], [NONE, 2]]])
    updates = rng.normal(size=(2, 3, 3)).astype(np.float16).astype(np.float32)
    assert np.array_equal(run("ScatterND", cache, indices, updates, source), scatter_nd(cache, indices, updates))


@SOURCES
@pytest.mark.parametrize("opset", [13, 18])
def test_nothing_is_written_if_all_rows_are_dropped(source, opset, run):
    indices = np.full((2, 1), NONE, np.int64)
    assert np.array_equal(run("ScatterND", DATA, indices, np.ones((2, 6), np.float32), source, opset), DATA)


@pytest.mark.parametrize("how", ["add", "mul", "max", "min"])
def test_scatter_with_a_reduction(how, run):
    updates = np.array([[3, -2, 5], [1, 4, 2]], np.float32)
    elements = np.array([[1, NONE, 0], [1, 1, NONE]])
    actual = run("ScatterElements", DATA, elements, updates, "computed", axis=1, reduction=how)
    assert np.array_equal(actual, scatter_elements(DATA, elements, updates, 1, how))


@SOURCES
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_scatter_elements_are_dropped_one_by_one(source, dtype, axis, run):
    data = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    shape = (2, 2, 3)
    # Distinct along the axis, so the order of writes does not matter.
    indices = (np.indices(shape)[axis] + 1).astype(dtype)
    indices[0, 1, 0] = indices[1, 1, 2] = NONE
    updates = -np.arange(1, 13, dtype=np.float32).reshape(shape)
    actual = run("ScatterElements", data, indices, updates, source, axis=axis)
    assert np.array_equal(actual, scatter_elements(data, indices, updates, axis))


@SOURCES
@pytest.mark.parametrize(
    ("op", "dtype"),
    [("Gather", np.int32), ("Gather", np.int64), ("GatherElements", np.int32), ("GatherElements", np.int64),
     ("GatherND", np.int64)],
)  # fmt: skip
def test_gathers_read_something_finite(source, dtype, op, run):
    indices = np.array([[1, NONE], [NONE, 2], [0, 3]], dtype)
    actual = run(op, DATA, indices, None, source, **({} if op == "GatherND" else {"axis": 0}))
    valid = indices != NONE
    if op == "Gather":
        expected = DATA[np.where(valid, indices, 0)]
    elif op == "GatherElements":
        expected = DATA[np.where(valid, indices, 0), np.arange(2)]
    else:
        valid, expected = np.array([False, False, True]), DATA[tuple(np.where(valid, indices, 0).T)]
    assert actual.shape == expected.shape
    assert np.array_equal(actual[valid], expected[valid])
    assert np.isin(actual, DATA).all(), "what is read for INT32_MAX is content of the data"


def test_negative_indices_are_left_alone(run):
    indices = np.array([[-1], [NONE], [1]])
    updates = -np.ones((3, 6), np.float32)
    assert np.array_equal(run("ScatterND", DATA, indices, updates), scatter_nd(DATA, indices, updates))


@pytest.mark.parametrize("op", ["ScatterND", "Gather"])
def test_other_indices_out_of_range_stay_errors(op, make_model, compile_onnx, client, capsys):
    inputs = {"data": (F, [4, 6]), "indices": (I64, [1, 1])} | ({"u": (F, [1, 6])} if op == "ScatterND" else {})
    m = make_model([node(op, list(inputs), ["y"])], inputs, {"y": (F, ["a", "b", "c"][: 2 + (op == "Gather")])})
    c = client(compile_onnx(m).directory)
    c.set(indices=np.array([[4]]))
    assert c.status() == rt.QStatus.QS_ERROR
    assert "Error running program" in capsys.readouterr().err


def test_constants_in_range_cost_nothing(make_model, compile_onnx):
    big = np.tile(np.arange(4), 100)
    nodes = [
        node("Gather", ["x", "small"], ["a"]),
        node("Gather", ["x", "big"], ["b"]),
        node("Constant", [], ["c"], value_ints=[0, 1]),
        node("Gather", ["a", "c"], ["d"]),
        node("Concat", ["b", "d"], ["y"], axis=0),
    ]
    m = make_model(nodes, {"x": (F, [4, 2])}, {"y": (F, ["n", 2])}, {"small": np.array([3, 0]), "big": big})
    graph = onnx.load_from_string(qpc.read(compile_onnx(m).directory).network).graph
    assert [entry.op_type for entry in graph.node] == ["Gather", "Gather", "Constant", "Gather", "Concat"]
    big[7] = NONE
    m = make_model(nodes, {"x": (F, [4, 2])}, {"y": (F, ["n", 2])}, {"small": np.array([3, 0]), "big": big})
    graph = onnx.load_from_string(qpc.read(compile_onnx(m, name="other").directory).network).graph
    assert [entry.op_type for entry in graph.node].count("Where") == 1


def test_nodes_with_the_same_indices_share_what_is_computed_of_them(make_model, compile_onnx, client):
    nodes = [node("ScatterND", [f"data{i}", "indices", "updates"], [f"y{i}"]) for i in range(3)]
    nodes += [node("GatherND", [f"data{i}", "indices"], [f"z{i}"]) for i in range(3)]
    data = [np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * i for i in range(3)]
    indices, updates = np.array([[1], [NONE]]), np.full((2, 2), 7, np.float32)
    inputs = {f"data{i}": (F, [3, 2]) for i in range(3)} | {"indices": (I64, [2, 1]), "updates": (F, [2, 2])}
    outputs = {f"y{i}": (F, [3, 2]) for i in range(3)} | {f"z{i}": (F, [2, 2]) for i in range(3)}
    compiled = compile_onnx(make_model(nodes, inputs, outputs))
    network = onnx.load_from_string(qpc.read(compiled.directory).network).graph.node
    assert [n.op_type for n in network].count("Equal") == 1
    assert [n.op_type for n in network].count("NonZero") == 1
    found = client(compiled.directory).run(**{f"data{i}": data[i] for i in range(3)}, indices=indices, updates=updates)
    for i in range(3):
        np.testing.assert_array_equal(found[f"y{i}"], scatter_nd(data[i], indices, updates))
        np.testing.assert_array_equal(found[f"z{i}"][0], data[i][1])


def test_in_a_subgraph(make_model, compile_onnx, client):
    body = helper.make_graph(
        [node("Gather", ["x", "ids"], ["picked"])], "b", [], [helper.make_tensor_value_info("picked", F, None)]
    )
    other = helper.make_graph(
        [node("Gather", ["x", "zeros"], ["first"])], "o", [], [helper.make_tensor_value_info("first", F, None)]
    )
    m = make_model(
        [node("If", ["flag"], ["y"], then_branch=body, else_branch=other)],
        {"x": (F, [4]), "ids": (I64, [2]), "flag": (TensorProto.BOOL, [])}, {"y": (F, [2])},
        {"zeros": np.array([0, 0])},
    )  # fmt: skip
    x = np.array([5, 6, 7, 8], np.float32)
    actual = client(compile_onnx(m).directory).run(x=x, ids=np.array([NONE, 2]), flag=np.array([1], np.int8))["y"]
    assert actual[1] == 7
    assert actual[0] in x


def test_a_single_row_of_indices(run):
    """Indices with one dim are one row; the node is not changed."""
    assert run("ScatterND", DATA, np.array([1]), np.full(6, -1, np.float32))[1].tolist() == [-1] * 6
