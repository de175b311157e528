# SPDX-License-Identifier: Apache-2.0
"""Mutants of an ONNX graph: errors of a converter, of a compiler, or of a manual edit after the export.

Each change takes a graph of either exporter, weights included, and changes it in place, so callers pass a copy. A fault
of one node is in the first node of the last third of such nodes unless its name says otherwise: few later nodes amplify
the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.builders.onnx_patterns import attribute, producers, root_mean_squares
from qeff_validate.models.emulation.microscaling import E2M3, in_blocks
from qeff_validate.mutation import graph_finder
from qeff_validate.mutation.mutant import GraphMutant, Inapplicable
from qeff_validate.tensors import Array

Change = Callable[[onnx.ModelProto], None]


def _in_late_weight(edit: Callable[[Array], Array]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        weight = graph_finder.first_of_last_third(graph_finder.weights(model))
        weight.write(edit(weight.array()))

    return change


def _negated_row(rows: Array) -> Array:
    rows[..., 0, :] = np.negative(rows[..., 0, :])
    return rows


def _as_int8(rows: Array) -> Array:
    """Quantize each row to int8 with its own scale, and dequantize it."""
    scale = np.abs(rows).max(-1, keepdims=True) / 127
    scale[scale == 0] = 1
    rounded: Array = np.rint(rows / scale) * scale
    return rounded


def _exchanged(model: onnx.ModelProto) -> None:
    weights = graph_finder.weights(model)
    for first in weights:
        rows = first.array()
        same_shape = (
            weight for weight in weights if weight.tensor.dims == first.tensor.dims and weight.summed == first.summed
        )
        # layers that share a weight may hold copies of it
        candidates = [weight for weight in same_shape if not np.array_equal(weight.array(), rows)]
        if candidates:
            second = candidates[len(candidates) // 2]
            first.write(second.array())
            second.write(rows)
            return
    raise Inapplicable("no two weights in the graph have one shape")


def _without_weight(model: onnx.ModelProto) -> None:
    weights = graph_finder.weights(model)
    # the last one is the head of a language model, without which there is nothing to compare
    largest = max(weights[:-1] or weights, key=lambda weight: weight.array().size)
    largest.write(np.zeros_like(largest.array()))


def _without_bias(model: onnx.ModelProto) -> None:
    producer = producers(model.graph)
    vectors = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 1}

    def bias_of(node: onnx.NodeProto) -> str | None:
        operands = [producer[name] for name in node.input if name in producer]
        if node.op_type == "Add" and any(operand.op_type in graph_finder.PRODUCTS for operand in operands):
            return next((name for name in node.input if name in vectors), None)
        return node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] in vectors else None

    # from the end: the bias of the keys has no effect in an attention
    for name in filter(None, map(bias_of, reversed(model.graph.node))):
        values = numpy_helper.to_array(vectors[name])
        if values.any():
            graph_finder.write(vectors[name], np.zeros_like(values))
            return
    raise Inapplicable("no product in the graph has a bias")


def _norms(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, int | None, float]]:
    """Return the nodes with an epsilon, each with the index of the input for it (None: an attribute) and its value."""
    producer, norms = producers(model.graph), list[tuple[onnx.NodeProto, int | None, float]]()
    decomposed = {norm.mean.output[0]: norm.epsilon_sum for norm in root_mean_squares(model.graph)}
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            norms.append((node, None, attribute(node, "epsilon") or 1e-5))
        epsilon_sum = decomposed.get(node.output[0])
        for place, name in enumerate(epsilon_sum.input if epsilon_sum is not None else ()):
            value = graph_finder.scalar(model, producer, name)
            if epsilon_sum is not None and value is not None:
                norms.append((epsilon_sum, place, value))
    if not norms:
        raise Inapplicable("the graph has no norm")
    return norms


def _epsilon(model: onnx.ModelProto) -> None:
    node, place, epsilon = graph_finder.first_of_last_third(_norms(model))
    larger = max(1e4 * epsilon, 1e-3)  # 1e-3 is the default of Keras
    if place is not None:
        node.input[place] = graph_finder.constant(model, f"{node.output[0]}.epsilon", larger)
        return
    others = [entry for entry in node.attribute if entry.name != "epsilon"]
    del node.attribute[:]
    node.attribute.extend([*others, helper.make_attribute("epsilon", larger)])


def _half_operands(model: onnx.ModelProto) -> None:
    node = graph_finder.first_of_last_third(graph_finder.weights(model)).node
    casts = []
    for place, name in enumerate(node.input[:2]):
        half, restored = (f"{node.output[0]}.{place}.{step}" for step in ("half", "restored"))
        casts.append(helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
        casts.append(helper.make_node("Cast", [half], [restored], to=TensorProto.FLOAT))
        node.input[place] = restored
    graph_finder.insert(model, node, casts, after=False)


def _compressed(model: onnx.ModelProto) -> None:
    for weight in graph_finder.weights(model):
        weight.write(in_blocks(torch.from_numpy(weight.array()), E2M3, -1).numpy())


def _clipped(model: onnx.ModelProto) -> None:
    node = graph_finder.first_of_last_third(graph_finder.weights(model)).node
    name = node.output[0]
    two = graph_finder.constant(model, f"{name}.two", 2.0)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    dims: dict[str, Any] = {"axes": [-1]}
    axes: list[str] = []
    if opset >= 18:  # before, axes were an attribute
        dims, axes = {}, [f"{name}.axes"]
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), axes[0]))

    steps = ("square", "mean", "root", "high", "low", "below")

    def clip(before: str, after: str) -> list[onnx.NodeProto]:
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

    graph_finder.insert_after(model, node, clip)


def _attention_scale(factor: float) -> Change:
    def change(model: onnx.ModelProto) -> None:
        # at the product, because the scale itself may be a constant after it, one before it, or part of a weight
        product, _ = graph_finder.first_of_last_third(graph_finder.attentions(model))
        graph_finder.scaled(model, product, factor)

    return change


def _no_attention(model: onnx.ModelProto) -> None:
    graph_finder.scaled(model, graph_finder.attentions(model)[0][1], 0.0)


def _output_scale(model: onnx.ModelProto) -> None:
    graph_finder.scaled(model, producers(model.graph)[model.graph.output[0].name], 1.01)


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
"""None of them is tried in each run: they need a graph and a runtime for it."""
