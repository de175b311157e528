# SPDX-License-Identifier: Apache-2.0
"""What the compiler's inputs take from a graph: retained state, and the nodes that compute in float32."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qeff_validate.builders.compiler_inputs import read_graph, renamed_dims
from qeff_validate.errors import BuildError


def saved(folder: Path, *nodes: onnx.NodeProto) -> Path:
    def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["n", 4])

    constants = [helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]), helper.make_tensor("eps", 1, [], [1e-6])]
    inputs = [value("x"), value("position_ids", TensorProto.INT64), value("ids", TensorProto.INT64)]
    outputs = [value("y"), value("x_RetainedState"), value("ids_RetainedState", TensorProto.INT64)]
    copies = [helper.make_node("Identity", [name], [f"{name}_RetainedState"]) for name in ("x", "ids")]
    graph = helper.make_graph([*nodes, *copies], "g", inputs, outputs, constants)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_state_is_an_input_with_a_twin_and_has_a_type(tmp_path: Path) -> None:
    facts = read_graph(saved(tmp_path, helper.make_node("Relu", ["x"], ["y"])))
    assert facts.states == {"x": True, "ids": False}
    assert facts.float32_nodes == ()


@pytest.mark.parametrize("square", [("Pow", ["x", "two"]), ("Mul", ["x", "x"])], ids=lambda square: square[0])
def test_root_mean_square_computes_in_float32_and_the_product_with_it_does_not(tmp_path: Path, square: tuple) -> None:
    nodes = [
        helper.make_node(square[0], square[1], ["squared"]),
        helper.make_node("ReduceMean", ["squared"], ["mean"]),
        helper.make_node("Add", ["mean", "eps"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["inverse"]),
        helper.make_node("Mul", ["x", "inverse"], ["y"]),
    ]
    assert set(read_graph(saved(tmp_path, *nodes)).float32_nodes) == {"squared", "mean", "sum", "root", "inverse"}


def test_product_of_two_different_values_is_no_square(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("ReduceMean", ["double"], ["mean"]),
        helper.make_node("Add", ["x", "mean"], ["y"]),
    ]
    assert read_graph(saved(tmp_path, *nodes)).float32_nodes == ()


def test_rotary_angles_compute_in_float32_from_the_positions_on(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["position_ids"], ["place"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["place", "two"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["sine"]),
        helper.make_node("Mul", ["x", "sine"], ["y"]),
    ]
    assert set(read_graph(saved(tmp_path, *nodes)).float32_nodes) == {"place", "angle", "sine"}


def test_file_that_is_no_onnx_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    with pytest.raises(BuildError, match=r"cannot read .*model\.onnx as ONNX"):
        read_graph(tmp_path / "model.onnx")


def test_symbolic_dims_are_named_as_the_file_names_them() -> None:
    buckets = [{"batch_size": 4, "seq_len": 32}, {"batch_size": 4, "seq_len": 64}]
    dims = {"ids": ("batch_size", "seq_len"), "mask": ("batch_size", "seq_len")}
    theirs = {"ids": ["batch", "sequence"], "mask": ["batch", "mask_length"]}
    assert renamed_dims(buckets, theirs, dims) == [
        {"batch": 4, "sequence": 32, "mask_length": 32},
        {"batch": 4, "sequence": 64, "mask_length": 64},
    ]
    assert renamed_dims(buckets, {"ids": ["", ""]}, dims) == buckets  # static, or without names
    assert renamed_dims(buckets, theirs, {}) == buckets  # exported by this library
