# SPDX-License-Identifier: Apache-2.0
"""Where things are in an ONNX graph: weights of products, attentions, constants; and how nodes are put between others.

Nodes are found by their operators and by what they read, never by name, so the graphs of both exporters will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.mutation.mutant import Inapplicable
from qeff_validate.tensors import Array

T = TypeVar("T")
Made = Callable[[str, str], Sequence[onnx.NodeProto]]
"""From the names of a value before and after a fault to the nodes between."""

PRODUCTS = frozenset({"MatMul", "Gemm"})
AFTER_SCORES = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Tanh", "Concat", "Reshape"})
"""What lies between the product of queries and keys and its softmax: scale, mask, soft cap, sink."""


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer that a product reads.

    Attributes:
        node: the product that reads it first.
        tensor: the initializer.
        summed: the dim that the product sums over, counted from the end.
    """

    node: onnx.NodeProto
    tensor: onnx.TensorProto
    summed: int

    def array(self) -> Array:
        """Return a copy of the weight as ``[…, out, in]``."""
        lines: Array = np.moveaxis(numpy_helper.to_array(self.tensor), self.summed, -1).copy()
        return lines

    def write(self, lines: Array) -> None:
        """Set the weight, given as ``[…, out, in]``."""
        write(self.tensor, np.moveaxis(lines, -1, self.summed))


def write(tensor: onnx.TensorProto, values: Array) -> None:
    """Set an initializer."""
    held = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=held), tensor.name))


def makers_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each value."""
    return {name: node for node in model.graph.node for name in node.output}


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """Return an attribute's value; None if the node leaves it out."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def weights(model: onnx.ModelProto) -> list[Weight]:
    """Return the weights of products in the order of the nodes; each once, and at least one."""
    makers, found = makers_of(model), dict[str, Weight]()
    held = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1}
    experts = {name for name, tensor in held.items() if len(tensor.dims) > 2}
    for node in model.graph.node:
        for place, name in enumerate(node.input[:2] if node.op_type in PRODUCTS else ()):
            turned = bool(attribute(node, ("transA", "transB")[place]))
            weight, summed = _source(makers, experts, name, -2 if (place == 1) != turned else -1)
            if weight in held:
                found.setdefault(weight, Weight(node, held[weight], summed))
    if not found:
        raise Inapplicable("no product in the graph reads a weight of its own")
    return list(found.values())


def _source(makers: Mapping[str, onnx.NodeProto], experts: Set[str], name: str, axis: int) -> tuple[str, int]:
    """Follow an axis of a value, counted from the end, back to what was turned round or chosen from experts."""
    while name in makers:
        node = makers[name]
        perm = attribute(node, "perm")
        if node.op_type == "Transpose" and perm:
            axis = perm[axis] - len(perm)
        elif node.op_type in ("Gather", "GatherND"):
            if node.input[0] not in experts or attribute(node, "axis"):
                break
        elif node.op_type != "Identity":
            break
        name = node.input[0]
    return name, axis


def late(found: Sequence[T]) -> T:
    """Return the first of the last third."""
    return found[2 * len(found) // 3]


def scalar(model: onnx.ModelProto, makers: Mapping[str, onnx.NodeProto], name: str) -> float | None:
    """Return the value of a constant of one number."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.name == name]
    made = makers.get(name)
    if made is not None and made.op_type == "Constant":
        value = attribute(made, "value")
        tensors += [] if value is None else [value]
    values = numpy_helper.to_array(tensors[0]) if tensors else np.zeros(2)
    return float(values.item()) if values.size == 1 else None


def constant(model: onnx.ModelProto, name: str, value: float) -> str:
    """Add a number under a name, which is returned."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
    return name


def insert(model: onnx.ModelProto, at: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], *, after: bool) -> None:
    """Put nodes before or after one."""
    place = list(model.graph.node).index(at) + after
    for node in reversed(nodes):
        model.graph.node.insert(place, node)


def behind(model: onnx.ModelProto, node: onnx.NodeProto, made: Made) -> None:
    """Put nodes between a node's first output and all that read it."""
    name = node.output[0]
    node.output[0] = f"{name}.before"
    insert(model, node, made(node.output[0], name), after=True)


def scaled(model: onnx.ModelProto, node: onnx.NodeProto, factor: float) -> None:
    """Multiply what a node gives by a number."""
    by = constant(model, f"{node.output[0]}.factor", factor)
    behind(model, node, lambda before, after: [helper.make_node("Mul", [before, by], [after])])


def attentions(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Return the product of queries and keys with the softmax of each attention; at least one."""
    makers, found = makers_of(model), []
    weighted = {weight.node.output[0] for weight in weights(model)}
    for softmax in model.graph.node:
        pending = list(softmax.input) if softmax.op_type == "Softmax" else []
        while pending:
            node = makers.get(pending.pop(0))
            if node is not None and node.op_type == "MatMul":
                if node.output[0] not in weighted:  # a router chooses by a weight
                    found.append((node, softmax))
                break
            if node is not None and node.op_type in AFTER_SCORES:
                pending += node.input
    if not found:
        raise Inapplicable("the graph has no softmax behind a product of queries and keys")
    return found
