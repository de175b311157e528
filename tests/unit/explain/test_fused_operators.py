# SPDX-License-Identifier: Apache-2.0
"""Faults in graphs of ONNX Runtime's optimizer: operators that do the work of several modules, and float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qeff_validate.config.case import Artifacts, Case
from qeff_validate.engine import Runner

pytestmark = pytest.mark.integration

BERT = Case(
    name="bert",
    source="random:bert",
    config={"num_hidden_layers": 5},
    tolerance="table",
    inputs={"texts": ["one two three", "a river", "the hills"]},
    options={"pooling": "mean", "seq_len": [8], "batch_size": 2},
)


def fuse(model: Any) -> None:
    """Replace each norm with the residual sum and the bias before it, and each activation with its bias."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}

    def parts_of(name: str) -> list[str]:
        node = makers.get(name)
        return list(node.input) if node is not None and node.op_type == "Add" else []

    for node in [node for node in graph.node if node.op_type == "Mul"]:  # x · (0.5 · (1 + erf(x / sqrt(2))))
        given, factor = makers.get(node.input[0]), makers.get(node.input[1])
        if given is not None and factor is not None and {given.op_type, factor.op_type} == {"Add", "Mul"}:
            node.op_type, node.domain = "BiasGelu", "com.microsoft"
            node.input[:] = parts_of(node.input[0])
    for node in graph.node:
        terms = parts_of(node.input[0]) if node.op_type == "LayerNormalization" else []
        biased = [(term, parts_of(term)) for term in terms if constants & set(parts_of(term))]
        if biased:
            term, (product, bias) = biased[0]
            skip = next(other for other in terms if other != term)
            node.op_type, node.domain = "SkipLayerNormalization", "com.microsoft"
            node.input[:] = [product, skip, *node.input[1:], bias]
            (small,) = [attribute for attribute in node.attribute if attribute.name == "epsilon"]
            del node.attribute[:]
            node.attribute.extend([small])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    del model.metadata_props[:]
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.node[:]
    graph.node.extend(kept[::-1])


def of_type(model: Any, operator: str) -> list[Any]:
    return [node for node in model.graph.node if node.op_type == operator]


def epsilon(model: Any) -> None:
    norm = of_type(model, "SkipLayerNormalization")[6]  # of layer 3, behind its attention
    norm.attribute[0].f = 0.1


def activation(model: Any) -> None:
    of_type(model, "BiasGelu")[3].op_type = "FastGelu"


def scores(model: Any) -> None:
    softmax = of_type(model, "Softmax")[3]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
    place = list(model.graph.node).index(softmax)
    model.graph.node.insert(place, helper.make_node("Mul", [softmax.input[0], "half"], ["halves"]))
    softmax.input[0] = "halves"


def zero_row(model: Any) -> None:
    tensor = next(
        tensor for tensor in model.graph.initializer if tensor.name.endswith("layer.3.intermediate.dense.bias")
    )
    reader = next(node for node in of_type(model, "Add") if tensor.name in node.input)
    product = next(node for node in of_type(model, "MatMul") if node.output[0] in reader.input)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    array = numpy_helper.to_array(weight).copy()
    array[:, 5] = 0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def half_scores(model: Any) -> None:
    scores(model)
    half = next(tensor for tensor in model.graph.initializer if tensor.name == "half")
    half.CopyFrom(numpy_helper.from_array(np.float16(0.5), "half"))


def healthy(_: Any) -> None:
    """Change nothing."""


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.mark.parametrize(
    ("damage", "module", "finding"),
    [
        (epsilon, "attention.output.LayerNorm", "epsilon 0.1 instead of 1e-12"),
        (activation, "intermediate.intermediate_act_fn", "gelu_tanh instead of gelu"),
        (scores, "attention.self", "scores scaled by 0.5"),
    ],
)
def test_fault_is_named_though_the_graph_has_no_value_for_many_modules(
    damage: Callable[[Any], None], module: str, finding: str, runner: Runner, tmp_path: Path
) -> None:
    path = runner.pipeline(BERT).onnx().path
    assert path is not None
    model = onnx.load(str(path))
    fuse(model)
    assert (len(of_type(model, "SkipLayerNormalization")), len(of_type(model, "BiasGelu"))) == (10, 5)
    damage(model)
    onnx.save(model, str(tmp_path / "model.onnx"))
    faulty = BERT.model_copy(update={"artifacts": Artifacts(onnx=str(tmp_path / "model.onnx"))})
    found = runner.explained(faulty, "ort").explanation
    assert found is not None
    assert (found.stage, found.module, found.finding) == ("export", f"encoder.layer.3.{module}", finding)


@pytest.mark.filterwarnings("ignore")  # of the converter, of numbers that are too small for float16
@pytest.mark.parametrize(
    ("damage", "module", "finding"),
    [
        (zero_row, "encoder.layer.3.intermediate.dense", "weight row 5 is zero"),
        (half_scores, "encoder.layer.3.attention.self", "scores scaled by 0.5"),
        (healthy, None, ""),
    ],
)
def test_rounding_to_float16_is_no_finding_in_a_file_of_float16(
    damage: Callable[[Any], None], module: str | None, finding: str, runner: Runner, tmp_path: Path
) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = runner.pipeline(BERT).onnx().path
    assert path is not None
    model = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    del model.metadata_props[:]
    damage(model)
    onnx.save(model, str(tmp_path / "model.onnx"))
    file = BERT.model_copy(update={"artifacts": Artifacts(onnx=str(tmp_path / "model.onnx"))})
    result = runner.explained(file, "ort")
    assert (result.status, result.precision) == ("fail" if finding else "pass", "fp16")
    found = result.explanation
    assert found is not None
    assert (found.module, found.finding) == (module, finding)
