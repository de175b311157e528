# SPDX-License-Identifier: Apache-2.0
"""Faults of a small graph whose names say nothing: the module and what differs in it are found by content."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_graph import Body, body, examine, graph

from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.matching import Matcher
from qeff_validate.explain.weights import copy_finding
from qeff_validate.protocols import Settings
from qeff_validate.runtimes.ort import OrtRuntime


def initializers(proto: Any, like: Any) -> Any:
    """Return the initializer with some content."""
    return next(t for t in proto.graph.initializer if np.array_equal(numpy_helper.to_array(t), like))


def changed(tensor: Any, edit: Callable[[Any], Any]) -> None:
    """Replace the content of an initializer."""
    values = edit(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.astype(np.float32)), tensor.name))


def in_weight(path: str, edit: Callable[[Any], Any], name: str = "weight") -> Callable[[Any, Body], None]:
    """Return a fault of a weight, which the edit takes as torch has it."""

    def apply(proto: Any, model: Body) -> None:
        value = model.get_submodule(path).get_parameter(name).detach().numpy()
        turned = value.T if value.ndim == 2 and path != "words" else value
        turn = (lambda array: array.T) if turned is not value else (lambda array: array)
        changed(initializers(proto, turned), lambda array: turn(edit(turn(array))))

    return apply


def zero_row(array: Any) -> Any:
    array[3] = 0
    return array


def swap_rows(array: Any) -> Any:
    array[[1, 4]] = array[[4, 1]]
    return array


def negated_column(array: Any) -> Any:
    array[:, 2] *= -1
    return array


def int8(array: Any) -> Any:
    scale = np.abs(array).max(-1, keepdims=True) / 127
    return np.rint(array / scale) * scale


def not_a_number(array: Any) -> Any:
    array[0, 1] = np.nan
    return array


def one_element(array: Any) -> Any:
    array[2, 3] += 0.25
    return array


def nodes(proto: Any, operator: str) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type == operator]


def epsilon(proto: Any, _: Body) -> None:
    node = nodes(proto, "LayerNormalization")[1]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("epsilon", 1e-3))


def gelu_tanh(proto: Any, _: Body) -> None:
    nodes(proto, "Gelu")[0].attribute.append(helper.make_attribute("approximate", "tanh"))


def relu(proto: Any, _: Body) -> None:
    nodes(proto, "Gelu")[1].op_type = "Relu"


def scale(proto: Any, model: Body) -> None:
    scaling = model.layers[1].attention.scaling
    node = nodes(proto, "Softmax")[1]
    before = next(n for n in proto.graph.node if n.output[0] == node.input[0])
    product = next(n for n in proto.graph.node if n.output[0] == before.input[0])
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.9 * scaling), "other"))
    product.input[1] = "other"


def weights_of(path: str, other: str, *, back: bool) -> Callable[[Any, Body], None]:
    """Return a fault: a layer has another one's weight, which has its own in turn if ``back``."""

    def apply(proto: Any, model: Body) -> None:
        own, others = (model.get_submodule(name).weight.detach().numpy().T for name in (path, other))
        first, second = initializers(proto, own), initializers(proto, others)
        changed(first, lambda _: others)
        if back:
            changed(second, lambda _: own)

    return apply


def swapped_weights(proto: Any, model: Body) -> None:
    first, second = (layer.up.weight.detach().numpy().T for layer in model.layers)
    one, other = initializers(proto, first), initializers(proto, second)
    changed(one, lambda _: second)
    changed(other, lambda _: first)


def wrap(proto: Any, node: Any, make: Callable[[str, str], list[Any]]) -> None:
    """Insert nodes behind a node."""
    name = node.output[0]
    node.output[0] = "inner"
    place = list(proto.graph.node).index(node)
    for new in reversed(make("inner", name)):
        proto.graph.node.insert(place + 1, new)


def output_scaled(proto: Any, _: Body) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "factor"))
    wrap(proto, proto.graph.node[-1], lambda a, b: [helper.make_node("Mul", [a, "factor"], [b])])


def output_plus(proto: Any, _: Body) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.25), "addend"))
    wrap(proto, proto.graph.node[-1], lambda a, b: [helper.make_node("Add", [a, "addend"], [b])])


def output_constant(proto: Any, _: Body) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.3), "constant"))
    wrap(
        proto,
        proto.graph.node[-1],
        lambda a, b: [
            helper.make_node("Mul", [a, "nothing"], ["zeros"]),
            helper.make_node("Add", ["zeros", "constant"], [b]),
        ],
    )


def output_of_first_row(proto: Any, _: Body) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.int64([0]), "first"))
    wrap(
        proto,
        proto.graph.node[-1],
        lambda a, b: [
            helper.make_node("Gather", [a, "first"], ["row"], axis=0),
            helper.make_node("Shape", [a], ["shape"]),
            helper.make_node("Expand", ["row", "shape"], [b]),
        ],
    )


def clipped_norm(proto: Any, _: Body) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.6), "high"))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(-0.6), "low"))
    node = nodes(proto, "LayerNormalization")[1]
    wrap(proto, node, lambda a, b: [helper.make_node("Clip", [a, "low", "high"], [b])])


def half_operands(proto: Any, _: Body) -> None:
    node = nodes(proto, "MatMul")[-1]
    casts = []
    for place in (0, 1):
        casts.append(helper.make_node("Cast", [node.input[place]], [f"half{place}"], to=TensorProto.FLOAT16))
        casts.append(helper.make_node("Cast", [f"half{place}"], [f"whole{place}"], to=TensorProto.FLOAT))
        node.input[place] = f"whole{place}"
    at = list(proto.graph.node).index(node)
    for new in reversed(casts):
        proto.graph.node.insert(at, new)


def without_mask(proto: Any, _: Body) -> None:
    softmax = nodes(proto, "Softmax")[1]
    softmax.input[0] = next(node for node in proto.graph.node if node.output[0] == softmax.input[0]).input[0]


def softmax_over_queries(proto: Any, _: Body) -> None:
    softmax = nodes(proto, "Softmax")[1]
    del softmax.attribute[:]
    softmax.attribute.append(helper.make_attribute("axis", -2))


def weak_mask(proto: Any, _: Body) -> None:
    softmax = nodes(proto, "Softmax")[1]
    add = next(node for node in proto.graph.node if node.output[0] == softmax.input[0])
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(-10), "weak"))
    at = list(proto.graph.node).index(add)
    proto.graph.node.insert(at, helper.make_node("Max", [add.input[1], "weak"], ["weak_mask"]))
    add.input[1] = "weak_mask"


def through_half(before: str, after: str) -> list[Any]:
    return [
        helper.make_node("Cast", [before], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], [after], to=TensorProto.FLOAT),
    ]


def half_output(proto: Any, _: Body) -> None:
    wrap(proto, nodes(proto, "LayerNormalization")[1], through_half)


def second_copy(proto: Any, model: Body) -> None:
    """One of two uses of a weight reads another copy, as graphs have of layers that share their weights."""
    weight = initializers(proto, model.layers[0].up.weight.detach().numpy().T)
    node = next(node for node in nodes(proto, "MatMul") if node.input[1] == weight.name)
    proto.graph.initializer.append(numpy_helper.from_array(np.roll(numpy_helper.to_array(weight), 1, 1), "copy"))
    node.input[1] = "copy"


def half_product(proto: Any, model: Body) -> None:
    weight = initializers(proto, model.layers[0].up.weight.detach().numpy().T)
    wrap(proto, next(node for node in nodes(proto, "MatMul") if node.input[1] == weight.name), through_half)


def without_attention(proto: Any, _: Body) -> None:
    softmax = nodes(proto, "Softmax")[1]
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    wrap(proto, softmax, lambda a, b: [helper.make_node("Mul", [a, "zero"], [b])])


def output_of_another(proto: Any, model: Body) -> None:
    """The words themselves stand in place of what the last attention gives."""
    weight = initializers(proto, model.layers[1].output.weight.detach().numpy().T)
    product = next(node for node in nodes(proto, "MatMul") if node.input[1] == weight.name)
    biased = next(node for node in nodes(proto, "Add") if node.input[0] == product.output[0])
    biased.CopyFrom(helper.make_node("Identity", [nodes(proto, "Gather")[0].output[0]], [biased.output[0]]))


def without_residual(proto: Any, _: Body) -> None:
    norm = nodes(proto, "LayerNormalization")[1]
    norm.input[0] = next(node for node in proto.graph.node if node.output[0] == norm.input[0]).input[1]


def residual_twice(proto: Any, _: Body) -> None:
    norm = nodes(proto, "LayerNormalization")[1]
    added = next(node for node in proto.graph.node if node.output[0] == norm.input[0])
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    at = list(proto.graph.node).index(added)
    proto.graph.node.insert(at, helper.make_node("Mul", [added.input[0], "two"], ["doubled"]))
    added.input[0] = "doubled"


def residual_zero_among_others(proto: Any, _: Body) -> None:
    """The words are multiplied by zero in the first sum, and other values are more like the sum than what it gives."""
    words = nodes(proto, "Gather")[0].output[0]
    added = next(node for node in nodes(proto, "Add") if node.input[0] == words)
    for number, factor in enumerate((0, 0.7, 0.8, 0.9, 1.1, 1.2)):
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(factor), f"times{number}"))
    at = list(proto.graph.node).index(added)
    proto.graph.node.insert(at, helper.make_node("Mul", [words, "times0"], ["nothing"]))
    proto.graph.node[at + 1].input[0] = "nothing"
    for number in range(1, 6):
        proto.graph.node.append(helper.make_node("Mul", [words, f"times{number}"], [f"words{number}"]))
        proto.graph.node.append(helper.make_node("Add", [f"words{number}", added.input[1]], [f"other{number}"]))


def residual_of_norm(proto: Any, _: Body) -> None:
    norm = nodes(proto, "LayerNormalization")[1]
    added = next(node for node in nodes(proto, "Add") if node.input[0] == norm.output[0])
    added.CopyFrom(helper.make_node("Identity", [added.input[1]], [added.output[0]]))


def norm_swapped(proto: Any, _: Body) -> None:
    norm = nodes(proto, "LayerNormalization")[1]
    norm.input[1], norm.input[2] = norm.input[2], norm.input[1]


def without_activation(proto: Any, _: Body) -> None:
    gelu = nodes(proto, "Gelu")[0]
    for node in proto.graph.node:
        node.input[:] = [gelu.input[0] if name == gelu.output[0] else name for name in node.input]
    proto.graph.node.remove(gelu)


def short_vocabulary(proto: Any, _: Body) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.int64(3), "most"))
    gather = nodes(proto, "Gather")[0]
    proto.graph.node.insert(0, helper.make_node("Min", [gather.input[1], "most"], ["ids/cut"]))
    gather.input[1] = "ids/cut"


def column_doubled(proto: Any, model: Body) -> None:
    factors = np.ones(12, np.float32)
    factors[4] = 2
    proto.graph.initializer.append(numpy_helper.from_array(factors, "factors"))
    bias = initializers(proto, model.layers[0].up.bias.detach().numpy())
    added = next(node for node in nodes(proto, "Add") if node.input[1] == bias.name)
    wrap(proto, added, lambda a, b: [helper.make_node("Mul", [a, "factors"], [b])])


def with_layers(*order: int) -> Callable[[Any, Body], None]:
    def apply(proto: Any, model: Body) -> None:
        made = body()
        made.layers = torch.nn.ModuleList([model.layers[at] for at in order])
        proto.CopyFrom(graph(made))

    return apply


def pooled_by_cls(proto: Any, _: Body) -> None:
    states = nodes(proto, "Mul")[-1].input[0]
    proto.graph.initializer.append(numpy_helper.from_array(np.int64(0), "first"))
    proto.graph.node[-1].CopyFrom(helper.make_node("Gather", [states, "first"], ["output"], axis=1))


def without_last_layer(proto: Any, model: Body) -> None:
    proto.CopyFrom(graph(short(model)))


def short(model: Body) -> Body:
    made = body()
    made.layers = torch.nn.ModuleList(list(model.layers)[:1])
    return made


FAULTS: list[tuple[str, Callable[[Any, Body], None], str, str]] = [
    ("zero row", in_weight("layers.1.up", zero_row), "layers.1.up", "weight row 3 is zero"),
    ("swapped rows", in_weight("layers.0.down", swap_rows), "layers.0.down", "weight 2 rows (1, 4) are swapped"),
    ("negated column", in_weight("layers.0.up", negated_column), "layers.0.up", "weight column 2 is negated"),
    ("int8", in_weight("layers.1.down", int8), "layers.1.down", "weight rounded to int8 by row"),
    ("bf16", in_weight("layers.1.down", lambda a: torch.from_numpy(a).bfloat16().float().numpy()), "layers.1.down",
     "weight rounded to bf16"),
    ("scaled", in_weight("layers.0.attention.value", lambda a: a * 1.02), "layers.0.attention.value",
     "weight scaled by 1.02"),
    ("NaN", in_weight("layers.0.up", not_a_number), "layers.0.up", "weight 1 of 96 values are NaN or infinite"),
    ("one element", in_weight("layers.0.up", one_element), "layers.0.up", "weight element [2, 3] is"),
    ("words", in_weight("words", lambda a: np.roll(a, 1, 1)), "words", "weight columns are shifted by 1"),
    ("no bias", in_weight("layers.1.down", np.zeros_like, "bias"), "layers.1.down", "bias is zero"),
    ("transposed", in_weight("layers.1.output", lambda a: a.T), "layers.1.output", "weight transposed"),
    ("query transposed", in_weight("layers.0.attention.query", lambda a: a.T), "layers.0.attention.query",
     "weight transposed"),
    ("value transposed", in_weight("layers.1.attention.value", lambda a: a.T), "layers.1.attention.value",
     "weight transposed"),
    ("siblings swapped", weights_of("layers.1.attention.query", "layers.1.attention.value", back=True),
     "layers.1.attention.query", "weight is that of layers.1.attention.value"),
    ("query and key swapped", weights_of("layers.0.attention.query", "layers.0.attention.key", back=True),
     "layers.0.attention.query", "weight is that of layers.0.attention.key"),
    ("swapped between layers", weights_of("layers.0.attention.value", "layers.1.attention.value", back=True),
     "layers.0.attention.value", "weight is that of layers.1.attention.value"),
    ("of another layer", weights_of("layers.1.output", "layers.0.output", back=False),
     "layers.1.output", "weight is that of layers.0.output"),
    ("swapped", swapped_weights, "layers.0.up", "weight is that of layers.1.up"),
    ("epsilon", epsilon, "layers.1.norm", "epsilon 0.001 instead of 1e-06"),
    ("gelu", gelu_tanh, "layers.0.act", "gelu_tanh instead of gelu"),
    ("relu", relu, "layers.1.act", "relu instead of gelu"),
    ("scale", scale, "layers.1.attention", "scores scaled by 0.9"),
    ("mask", without_mask, "layers.1.attention", "the mask is left out"),
    ("softmax", softmax_over_queries, "layers.1.attention", "its softmax runs over axis -2, not the last"),
    ("weak mask", weak_mask, "layers.1.attention", "the mask adds -10 to hidden places"),
    ("half output", half_output, "layers.1.norm", "its output is rounded to fp16"),
    ("square, shifted", in_weight("layers.1.output", lambda a: np.roll(a, 1, 0)), "layers.1.output",
     "weight rows are shifted by 1"),
    ("square, shifted columns", in_weight("layers.0.output", lambda a: np.roll(a, -1, 1)), "layers.0.output",
     "weight columns are shifted by -1"),
    ("memory order", in_weight("layers.0.up", lambda a: a.T.reshape(a.shape)), "layers.0.up",
     "weight read in the other memory order"),
    ("second copy", second_copy, "layers.0.up", "weight rows are shifted by 1"),
    ("half product", half_product, "layers.0.up", "its product is rounded to fp16"),
    ("no attention", without_attention, "layers.1.attention", "its output is zero"),
    ("another output", output_of_another, "layers.1.output", "its output is that of words"),
    ("residual", without_residual, "layers.1.norm", "it reads what layers.1.output gives, not its own input"),
    ("residual twice", residual_twice, "layers.1",
     "the residual, what layers.0 gives, is scaled by 2 in the sum"),
    ("residual of a norm", residual_of_norm, "layers.1",
     "the residual, what layers.1.norm gives, is left out of the sum"),
    ("norm swapped", norm_swapped, "layers.1.norm", "weight and bias are swapped"),
    ("without activation", without_activation, "layers.0.act", "is skipped"),
    ("vocabulary", short_vocabulary, "words", "reads row 3 for index 4, another row for 4 of 10"),
    ("column", column_doubled, "layers.0.up", "1 of 12 columns of its output, first column 4, are scaled by 2"),
    ("layer twice", with_layers(0, 1, 1), "layers.1", "runs twice"),
    ("first layer again", with_layers(0, 0), "layers.1", "is not in the graph: layers.0 runs in its place"),
    ("half operands", half_operands, "layers.1.down", "computed from fp16 operands"),
    ("clipped", clipped_norm, "layers.1.norm", "its output is clipped at 0.6"),
    ("scaled output", output_scaled, "pooling", "its output is scaled by 1.01"),
    ("output plus", output_plus, "pooling", "its output has 0.25 added"),
    ("constant output", output_constant, "pooling", "its output is 0.3 everywhere"),
    ("output of the first row", output_of_first_row, "pooling", "its output is the same for every row"),
    ("pooling", pooled_by_cls, "pooling", "pooled by cls"),
    ("missing layer", without_last_layer, "layers.1", "is not in the graph"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "module", "finding"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_fault_is_found_in_its_module_with_what_differs_there(
    fault: Callable[[Any, Body], None], module: str, finding: str, tmp_path: Path
) -> None:
    model = body()
    proto = graph(model)
    fault(proto, model)
    onnx.checker.check_model(proto)
    found = examine(model, proto, tmp_path)
    assert found.location.module == module
    assert found.location.finding.startswith(finding)


def test_healthy_graph_names_nothing_and_every_module_is_matched(tmp_path: Path) -> None:
    model = body()
    found = examine(model, graph(model), tmp_path)
    assert (found.location.module, found.location.finding) == (None, "")
    leaves = {path for path, module in model.named_modules() if next(module.children(), None) is None}
    assert leaves <= {error.module for error in found.layers.errors}
    assert max(error.local / error.floor for error in found.layers.errors) < 5


def test_value_is_matched_among_others_that_are_more_like_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matcher, "refined", lambda *_: None)  # which finds it too, if runs are left
    model = body()
    proto = graph(model)
    residual_zero_among_others(proto, model)
    added = next(node for node in nodes(proto, "Add") if node.input[0] == "nothing")
    layers = examine(model, proto, tmp_path).layers
    index = next(at for at, value in enumerate(layers.values) if value.place == ("layers.0.norm", "in", 0, 0))
    assert layers.matches.names[index] == added.output[0]


def test_products_in_another_order_are_no_exchanged_weights(tmp_path: Path) -> None:
    model = body()
    proto = graph(model)
    query = initializers(proto, model.layers[0].attention.query.weight.detach().numpy().T).name
    at = next(place for place, node in enumerate(proto.graph.node) if query in node.input)
    order = list(range(len(proto.graph.node)))
    order[at : at + 4] = [at + 2, at + 3, at, at + 1]  # each is a product and its bias
    moved = [onnx.NodeProto.FromString(proto.graph.node[place].SerializeToString()) for place in order]
    del proto.graph.node[:]
    proto.graph.node.extend(moved)
    found = examine(model, proto, tmp_path / "healthy")
    assert (found.location.module, found.location.finding) == (None, "")
    assert found.weights.findings == []
    in_weight("layers.1.down", np.zeros_like, "bias")(proto, model)
    found = examine(model, proto, tmp_path / "faulty")
    assert (found.location.module, found.location.finding) == ("layers.1.down", "bias is zero")


def test_error_behind_a_fault_is_inherited_and_not_made_there(tmp_path: Path) -> None:
    model = body()
    proto = graph(model)
    in_weight("layers.0.up", zero_row)(proto, model)
    errors = {error.module: error for error in examine(model, proto, tmp_path).layers.errors}
    behind = errors["layers.1.down"]
    assert behind.inherited > 1e-2
    assert behind.local < 5 * behind.floor
    assert errors["layers.0.up"].local > 1e4 * errors["layers.0.up"].floor


def test_values_of_one_run_are_kept_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    values: list[weakref.ref[Any]] = []
    run = GraphValues.run

    def watched(graph: GraphValues, *args: Any, **more: Any) -> Any:
        alive.append(sum(value() is not None for value in values))
        result = run(graph, *args, **more)
        if len(alive) > 1:  # what the graph gives by itself is kept
            values.extend(weakref.ref(array) for array in result.values())
        return result

    model = body()
    proto = graph(model)
    nodes(proto, "Gelu")[1].op_type = "Relu"
    monkeypatch.setattr(GraphValues, "run", watched)
    layers = examine(model, proto, tmp_path).layers
    assert layers.module == "layers.1.act"
    assert len(alive) > 3
    assert alive[-1] == 0
    shapes = {name: array.shape for name, array in layers.matches.inherited.items()}
    assert (2, 5, 5) in shapes.values(), "scores are as large as no value of the original model"
    of_modules = {value.array.shape for value in layers.values}
    empty = {name for name, array in layers.matches.inherited.items() if not any(array.strides)}
    assert empty == {name for name, shape in shapes.items() if shape not in of_modules}


def test_weights_in_another_layout_are_no_values(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 4] y)
    <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
        turned = Transpose (w)
        copy = Identity (turned)
        product = MatMul (x, copy)
        y = Relu (product)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    (tmp_path / "copies").mkdir()
    graph = GraphValues(tmp_path / "model.onnx", tmp_path / "copies", OrtRuntime(Settings()).open)
    x = np.ones((2, 3), np.float32)
    values = graph.run({"x": x})
    assert list(values) == ["product", "y"]
    np.testing.assert_array_equal(values["product"], [[6, 15, 24, 33]] * 2)
    assert list(graph.run({"x": x}, ["copy"])) == ["copy"], "what is asked for by name is given"


def test_zero_bias_of_an_operator_is_no_copy_of_a_weight() -> None:
    norm = torch.nn.LayerNorm(8, bias=False)
    assert copy_finding(norm, np.zeros(8, np.float32)) == ""
    assert copy_finding(torch.nn.LayerNorm(8), np.zeros(8, np.float32)) == "weight is zero"
