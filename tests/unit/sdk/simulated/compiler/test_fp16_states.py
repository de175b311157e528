# SPDX-License-Identifier: Apache-2.0
"""What a step reads and writes of a retained fp16 state is moved as fp16: the state is never converted whole."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qeff_validate.sdk.simulated import qpc

node = helper.make_node
STATE, KEPT = (1, 2, 6, 4), "past_RetainedState"
HALF = """
- {IOName: past, Precision: float16}
- {IOName: past_RetainedState, Precision: float16}
"""
READS = {
    "Slice": (
        [node("Slice", [KEPT, "first", "last", "axis"], ["part"])],
        lambda state: state[:, :, 1:3],
    ),
    "GatherND": (
        [node("GatherND", [KEPT, "places"], ["part"])],
        lambda state: state[0, [0, 1], [4, 2]],
    ),
    "rows of a matrix": (
        [node("Reshape", [KEPT, "matrix"], ["rows"]), node("Gather", ["rows", "numbers"], ["part"])],
        lambda state: state.reshape(-1, 4)[[4, 8]],
    ),
}
CONSTANTS = {
    "first": np.array([1]), "last": np.array([3]), "axis": np.array([2]),
    "places": np.array([[0, 0, 4], [0, 1, 2]]), "matrix": np.array([-1, 4]), "numbers": np.array([4, 8]),
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_parts_are_read_before_they_are_converted(read, make_model, compile_onnx, client):
    nodes, expected = READS[read]
    write = node("ScatterND", ["past", "at", "new"], [KEPT])
    inputs = {"past": (TensorProto.FLOAT, STATE), "at": (TensorProto.INT64, (1, 3)), "new": (TensorProto.FLOAT, (1, 4))}
    part = expected(np.zeros(STATE)).shape
    outputs = {KEPT: (TensorProto.FLOAT, STATE), "y": (TensorProto.FLOAT, part)}
    read_by = {name for each in nodes for name in each.input}
    constants = {name: value for name, value in CONSTANTS.items() if name in read_by}
    model = make_model([write, *nodes, node("Identity", ["part"], ["y"])], inputs, outputs, constants)
    compiled = compile_onnx(model, "-retained-state", "-convert-to-fp16", custom_io=HALF)
    assert compiled.code == 0, compiled.err
    graph = onnx.load_from_string(qpc.read(compiled.directory).network).graph
    kept = {"past", KEPT, "rows"}
    assert not [entry.name for entry in graph.node if entry.op_type == "Cast" and kept & {*entry.input, *entry.output}]
    past = np.random.default_rng(0).normal(size=STATE).astype(np.float16)
    new = np.arange(4, dtype=np.float32)[None]
    actual = client(compiled.directory).run(past=past, new=new, at=np.array([[0, 1, 2]]))
    written = past.copy()
    written[0, 1, 2] = new
    np.testing.assert_array_equal(actual[KEPT], written)
    np.testing.assert_array_equal(actual["y"], expected(written))
