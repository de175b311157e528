# SPDX-License-Identifier: Apache-2.0
"""A wrong mask over the slots of a cache is named, though the original model has no slots, and unwritten ones show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qeff_validate.config.case import Artifacts, Case
from qeff_validate.engine import Runner

pytestmark = pytest.mark.integration

LLAMA = Case(
    name="llama",
    model="peft-causal-lm",
    source="random:llama",
    tolerance="table",
    options={"prefill_seq_len": 8, "ctx_len": 24, "max_new_tokens": 4, "prompts": ["Once", "A river begins in hills"]},
)
BEYOND = 1 << 40
"""An end that is beyond each axis."""


def changed(model: Any, nodes: Sequence[Any], constants: dict[str, Any]) -> None:
    """Put nodes between the mask, their input MASK, and the scores of the second layer, which read their output NEW."""
    makers = {name: node for node in model.graph.node for name in node.output}
    softmax = [node for node in model.graph.node if node.op_type == "Softmax"][1]
    add = makers[softmax.input[0]]
    assert add.op_type == "Add"
    for node in nodes:
        node.input[:] = [add.input[1] if name == "MASK" else name for name in node.input]
    add.input[1] = "NEW"
    place = list(model.graph.node).index(add)
    whole = [*list(model.graph.node)[:place], *nodes, *list(model.graph.node)[place:]]
    del model.graph.node[:]
    model.graph.node.extend(whole)
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())


def left_out(model: Any) -> None:
    changed(model, [helper.make_node("Mul", ["MASK", "ZERO"], ["NEW"])], {"ZERO": np.float32(0)})


def weak(model: Any) -> None:
    changed(model, [helper.make_node("Max", ["MASK", "LEAST"], ["NEW"])], {"LEAST": np.float32(-5)})


def shifted(model: Any) -> None:
    nodes = [
        helper.make_node("Slice", ["MASK", "LAST", "END", "AXIS"], ["FIRST_PART"]),
        helper.make_node("Slice", ["MASK", "START", "LAST", "AXIS"], ["SECOND_PART"]),
        helper.make_node("Concat", ["FIRST_PART", "SECOND_PART"], ["NEW"], axis=3),
    ]
    changed(model, nodes, {"START": [0], "LAST": [-1], "END": [BEYOND], "AXIS": [3]})


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (left_out, "the mask is left out"),
        (weak, "the mask adds -5 to hidden places, which does not hide them"),
        (shifted, "the mask is shifted by +1"),
    ],
)
def test_wrong_mask_is_named(damage: Callable[[Any], None], finding: str, runner: Runner, tmp_path: Path) -> None:
    path = runner.pipeline(LLAMA).onnx().path
    assert path is not None
    model = onnx.load(str(path))
    damage(model)
    onnx.save(model, str(tmp_path / "model.onnx"))
    faulty = LLAMA.model_copy(update={"artifacts": Artifacts(onnx=str(tmp_path / "model.onnx"))})
    found = runner.explained(faulty, "ort").explanation
    assert found is not None
    assert (found.stage, found.module, found.finding) == ("export", "model.layers.1.self_attn", finding)
