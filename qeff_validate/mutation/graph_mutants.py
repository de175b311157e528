# SPDX-License-Identifier: Apache-2.0
"""Mutants of an ONNX graph: what a converter, a compiler or somebody's own surgery gets wrong after the export.

Each change takes a graph of either exporter, with its weights inside, and changes it in place, so it is given a copy.
A fault of one node sits where the last third of such nodes begins, if nothing else is said: what it does wrong is not
amplified by many others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.models.emulation.microscaling import E2M3, in_blocks
from qeff_validate.mutation import graph_finder
from qeff_validate.mutation.mutant import GraphMutant, Inapplicable
from qeff_validate.tensors import Array

Change = Callable[[onnx.ModelProto], None]


def _in_late_weight(made: Callable[[Array], Array]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        weight = graph_finder.late(graph_finder.weights(model))
        weight.write(made(weight.array()))

    return change


def _negated_row(lines: Array) -> Array:
    lines[..., 0, :] = np.negative(lines[..., 0, :])
    return lines


def _as_int8(lines: Array) -> Array:
    """Round each row to 255 multiples of a step of its own."""
    step = np.abs(lines).max(-1, keepdims=True) / 127
    step[step == 0] = 1
    rounded: Array = np.rint(lines / step) * step
    return rounded


def _exchanged(model: onnx.ModelProto) -> None:
    found = graph_finder.weights(model)
    for one in found:
        lines = one.array()
        alike = (weight for weight in found if weight.tensor.dims == one.tensor.dims and weight.summed == one.summed)
        # layers that share a weight may hold copies of it
        others = [weight for weight in alike if not np.array_equal(weight.array(), lines)]
        if others:
            other = others[len(others) // 2]
            one.write(other.array())
            other.write(lines)
            return
    raise Inapplicable("no two weights in the graph have one shape")


def _without_weight(model: onnx.ModelProto) -> None:
    found = graph_finder.weights(model)
    # the last one is a language model's head, without which there is nothing to compare
    largest = max(found[:-1] or found, key=lambda weight: weight.array().size)
    largest.write(np.zeros_like(largest.array()))


def _without_bias(model: onnx.ModelProto) -> None:
    makers = graph_finder.makers_of(model)
    held = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 1}

    def bias_of(node: onnx.NodeProto) -> str | None:
        made = [makers[name] for name in node.input if name in makers]
        if node.op_type == "Add" and any(maker.op_type in graph_finder.PRODUCTS for maker in made):
            return next((name for name in node.input if name in held), None)
        return node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] in held else None

    # from the end, because an attention does not feel the bias of its keys
    for name in filter(None, map(bias_of, reversed(model.graph.node))):
        values = numpy_helper.to_array(held[name])
        if values.any():
            graph_finder.write(held[name], np.zeros_like(values))
            return
    raise Inapplicable("no product in the graph has a bias")


def _norms(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, int | None, float]]:
    """Return the nodes that hold an epsilon, with the input that is it (None: an attribute is) and its value."""
    makers, found = graph_finder.makers_of(model), list[tuple[onnx.NodeProto, int | None, float]]()
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            found.append((node, None, graph_finder.attribute(node, "epsilon") or 1e-5))
        inside = makers.get(node.input[0]) if node.op_type == "Sqrt" else None
        if inside is None or inside.op_type != "Add":
            continue
        for place, other in ((0, 1), (1, 0)):
            value, mean = graph_finder.scalar(model, makers, inside.input[place]), makers.get(inside.input[other])
            if value is not None and mean is not None and mean.op_type == "ReduceMean":
                found.append((inside, place, value))
    if not found:
        raise Inapplicable("the graph has no norm")
    return found


def _epsilon(model: onnx.ModelProto) -> None:
    node, place, epsilon = graph_finder.late(_norms(model))
    larger = max(1e4 * epsilon, 1e-3)  # 1e-3 is the default of Keras
    if place is not None:
        node.input[place] = graph_finder.constant(model, f"{node.output[0]}.epsilon", larger)
        return
    kept = [entry for entry in node.attribute if entry.name != "epsilon"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("epsilon", larger)])


def _half_operands(model: onnx.ModelProto) -> None:
    node = graph_finder.late(graph_finder.weights(model)).node
    casts = []
    for place, name in enumerate(node.input[:2]):
        half, again = (f"{node.output[0]}.{place}.{what}" for what in ("half", "again"))
        casts.append(helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
        casts.append(helper.make_node("Cast", [half], [again], to=TensorProto.FLOAT))
        node.input[place] = again
    graph_finder.insert(model, node, casts, after=False)


def _compressed(model: onnx.ModelProto) -> None:
    for weight in graph_finder.weights(model):
        weight.write(in_blocks(torch.from_numpy(weight.array()), E2M3, -1).numpy())


def _clipped(model: onnx.ModelProto) -> None:
    node = graph_finder.late(graph_finder.weights(model)).node
    name = node.output[0]
    two = graph_finder.constant(model, f"{name}.two", 2.0)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    dims: dict[str, Any] = {"axes": [-1]}
    axes: list[str] = []
    if opset >= 18:  # before, axes were an attribute
        dims, axes = {}, [f"{name}.axes"]
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), axes[0]))

    steps = ("square", "mean", "root", "high", "low", "below")

    def made(before: str, after: str) -> list[onnx.NodeProto]:
        square, mean, root, high, low, below = (f"{name}.{step}" for step in steps)
        return [
            helper.make_node("Mul", [before, before], [square]),
            helper.make_node("ReduceMean", [square, *axes], [mean], keepdims=1, **dims),
            helper.make_node("Sqrt", [mean], [root]),
            helper.make_node("Mul", [root, two], [high]),
            helper.make_node("Neg", [high], [low]),
            helper.make_node("Min", [before, high], [below]),
            helper.make_node("Max", [below, low], [after]),
        ]

    graph_finder.behind(model, node, made)


def _attention_scale(factor: float) -> Change:
    # at the product, because the scale itself may be a constant behind it, one before it, or inside a weight
    return lambda model: graph_finder.scaled(model, graph_finder.late(graph_finder.attentions(model))[0], factor)


def _no_attention(model: onnx.ModelProto) -> None:
    graph_finder.scaled(model, graph_finder.attentions(model)[0][1], 0.0)


def _output_scale(model: onnx.ModelProto) -> None:
    graph_finder.scaled(model, graph_finder.makers_of(model)[model.graph.output[0].name], 1.01)


_LIST, _ROWS, _SIZES = "validation-methods §12.6", "upstream §5", "upstream §6"

GRAPH_MUTANTS: tuple[GraphMutant, ...] = (
    GraphMutant("graph: one row of a weight negated", "weights", _in_late_weight(_negated_row), _ROWS),
    GraphMutant("graph: two weights of one shape exchanged", "weights", _exchanged, _LIST),
    GraphMutant("graph: the largest weight is zero", "weights", _without_weight, _LIST, gross=True),
    GraphMutant("graph: one bias is zero", "weights", _without_bias, "tests/meta/test_faults.py"),
    GraphMutant("graph: one epsilon x 10000, at least 1e-3", "norms", _epsilon, "design §5"),
    GraphMutant("graph: one product of fp16 operands", "numbers", _half_operands, "design §5"),
    GraphMutant("graph: one weight rounded to int8", "numbers", _in_late_weight(_as_int8), _SIZES),
    GraphMutant("graph: weights rounded to MXFP6", "numbers", _compressed, _LIST),
    GraphMutant("graph: one product clipped at 2 rms", "numbers", _clipped, _LIST),
    GraphMutant("graph: scores of one attention x 0.9", "attention", _attention_scale(0.9), _SIZES),
    GraphMutant("graph: one softmax gives zeros", "attention", _no_attention, _LIST, gross=True),
    GraphMutant("graph: output x 1.01", "layers", _output_scale, _LIST),
)
"""None is tried in each run: they need a graph, and a runtime for it."""
