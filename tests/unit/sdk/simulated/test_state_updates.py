# SPDX-License-Identifier: Apache-2.0
"""States that a graph writes into keep their memory, and only those: the oracle is a run that copies them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.artifact import Artifact
from qeff_validate.runtimes.ort import OrtRuntime
from qeff_validate.sdk.simulated.state_updates import in_place_states

F, I64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node
WRITE = node("ScatterND", ["past", "at", "new"], ["past_RetainedState"])
FIRST = node("Slice", ["past", "zero", "one"], ["first"])
"""A read of the state, of the row that the last write went to."""

GRAPHS: dict[str, tuple[Sequence[Any], bool]] = {
    "write alone": ([node("Identity", ["x"], ["new"]), node("Identity", ["x"], ["y"]), WRITE], True),
    "read before": ([FIRST, node("Add", ["x", "first"], ["new"]), WRITE, node("Identity", ["new"], ["y"])], True),
    "only the shape is read": (
        [
            node("Identity", ["x"], ["new"]), WRITE, node("Shape", ["past"], ["shape"]),
            node("Cast", ["shape"], ["sizes"], to=F), node("Add", ["x", "sizes"], ["y"]),
        ],
        True,
    ),
    "read after": ([node("Identity", ["x"], ["new"]), WRITE, FIRST, node("Add", ["first", "x"], ["y"])], False),
    "read beside": ([FIRST, node("Identity", ["x"], ["new"]), node("Add", ["first", "x"], ["y"]), WRITE], False),
    "read in a branch": (
        [
            node("Identity", ["x"], ["new"]), WRITE,
            node(
                "If", ["flag"], ["y"],
                then_branch=helper.make_graph([FIRST], "then", [], [helper.make_tensor_value_info("first", F, None)]),
                else_branch=helper.make_graph(
                    [node("Identity", ["x"], ["other"])], "else", [], [helper.make_tensor_value_info("other", F, None)]
                ),
            ),
        ],
        False,
    ),
    "written twice": (
        [
            node("Identity", ["x"], ["new"]), node("ScatterND", ["past", "at", "new"], ["half"]),
            node("ScatterND", ["half", "at", "new"], ["past_RetainedState"]), node("Identity", ["x"], ["y"]),
        ],
        False,
    ),
    "made anew": ([node("Add", ["past", "x"], ["past_RetainedState"]), node("Identity", ["x"], ["y"])], False),
}  # fmt: skip


def model(nodes: Sequence[Any]) -> onnx.ModelProto:
    inputs = [("x", F, [1, 2]), ("at", I64, [1, 1]), ("past", F, [3, 2])]
    outputs = [("y", F, [1, 2]), ("past_RetainedState", F, [3, 2])]
    weights = {"zero": np.array([0]), "one": np.array([1]), "flag": np.array(True)}
    infos = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "g", *infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("name", GRAPHS)
def test_only_a_state_that_nothing_reads_after_the_write_is_written_in_place(name: str) -> None:
    nodes, expected = GRAPHS[name]
    assert in_place_states(model(nodes).graph, {"past": "past_RetainedState"}) == (["past"] if expected else [])


@pytest.mark.parametrize("name", GRAPHS)
def test_runs_are_those_of_a_graph_that_is_fed_its_state(name: str, tmp_path: Path) -> None:
    onnx.save(model(GRAPHS[name][0]), str(tmp_path / "model.onnx"))
    artifact = Artifact("onnx", tmp_path / "model.onnx", "0" * 64)
    start = np.arange(6, dtype=np.float32).reshape(3, 2)
    with OrtRuntime().open(artifact) as kept, OrtRuntime().open(artifact) as fed:
        past = start
        for step in range(4):
            feeds = {"x": np.full((1, 2), step + 10, np.float32), "at": np.array([[step % 3]])}
            ours = kept.run(feeds if step else {**feeds, "past": start}, fetch=["y", "past_RetainedState"])
            wanted = fed.run({**feeds, "past": past})
            np.testing.assert_array_equal(ours["y"], wanted["y"])
            past = wanted["past_RetainedState"]
            np.testing.assert_array_equal(ours["past_RetainedState"], past)
    np.testing.assert_array_equal(start.ravel(), np.arange(6))  # a client's array is no state
