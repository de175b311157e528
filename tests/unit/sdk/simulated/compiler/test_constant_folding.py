# SPDX-License-Identifier: Apache-2.0
"""Dims that depend on a value computed from shapes, which onnx's shape inference does not follow."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture
def rows(make_model):
    """y = x[arange(batch), last]: QEfficient's choice of the last token; the output's dims have no names."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Squeeze", ["batch", "zero"], ["count"]),
        helper.make_node("Range", ["start", "count", "step"], ["row"]),
        helper.make_node("Add", ["last", "row"], ["index"]),
        helper.make_node("Gather", ["x", "index"], ["y"]),
    ]
    weights = {"zero": np.array([0]), "start": np.array(0), "step": np.array(1)}
    inputs = {"x": (FLOAT, ["batch_size", 4]), "last": (INT64, [1])}
    return make_model(nodes, inputs, {"y": (FLOAT, ["rows_0", "rows_1"])}, weights)


@pytest.mark.parametrize("batch", [1, 3])
def test_range_over_a_shape_has_as_many_elements_as_the_shape_says(batch, rows, compile_onnx, client):
    done = compile_onnx(rows, specs=[{"batch_size": batch}])
    assert done.code == 0, done.err
    x = np.arange(4 * batch, dtype=np.float32).reshape(batch, 4)
    actual = client(done.directory).run(x=x, last=np.array([0]))
    np.testing.assert_array_equal(actual["y"], x[np.arange(batch)])


def test_each_specialization_has_its_own_dims(rows, compile_onnx):
    done = compile_onnx(rows, specs=[{"batch_size": 2}, {"batch_size": 5}])
    shapes = [[list(shape.dims) for shape in entry.shapes] for entry in done.desc.allowed_shapes]
    assert shapes == [[[2, 4], [1], [2, 4]], [[5, 4], [1], [5, 4]]]


def test_operands_of_range_with_one_element_are_taken_as_scalars(make_model, compile_onnx, client):
    """QEfficient's CtxGatherCB has such dims; ONNX Runtime refuses the graph if the dims of its data are constants."""
    nodes = [
        helper.make_node("Constant", [], ["table"], value=numpy_helper.from_array(np.zeros((3, 1), np.float32))),
        helper.make_node("Constant", [], ["start"], value_ints=[0]),
        helper.make_node("Constant", [], ["step"], value_ints=[1]),
        helper.make_node("Shape", ["table"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Range", ["start", "count", "step"], ["rows"]),
        helper.make_node("Add", ["x", "rows"], ["y"]),
    ]
    model = make_model(nodes, {"x": (INT64, [1])}, {"y": (INT64, [3])}, {"first": np.array([0])})
    done = compile_onnx(model)
    assert done.code == 0, done.err
    assert client(done.directory).run(x=np.array([5]))["y"].tolist() == [5, 6, 7]


def test_range_over_data_is_still_refused(make_model, compile_onnx):
    nodes = [
        helper.make_node("Squeeze", ["count", "zero"], ["limit"]),
        helper.make_node("Range", ["start", "limit", "step"], ["y"]),
    ]
    weights = {"zero": np.array([0]), "start": np.array(0), "step": np.array(1)}
    model = make_model(nodes, {"count": (INT64, [1])}, {"y": (INT64, ["rows"])}, weights)
    done = compile_onnx(model)
    assert done.code == 255
    assert "Range: 'limit' input must be a constant tensor" in done.err
