# SPDX-License-Identifier: Apache-2.0
"""Finds weights, attentions and constants in an ONNX graph, and inserts nodes.

Nodes are found by their operators and inputs, never by name, so the graphs of both exporters are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.builders.onnx_patterns import attribute, producers
from qeff_validate.mutation.mutant import Inapplicable
from qeff_validate.tensors import Array

T = TypeVar("T")
NodesBetween = Callable[[str, str], Sequence[onnx.NodeProto]]
"""Takes the names of a value before and after a fault, and returns the nodes between them."""

PRODUCTS = frozenset({"MatMul", "Gemm"})
AFTER_SCORES = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Tanh", "Concat", "Reshape"})
"""Operators between the product of queries and keys and its softmax: scale, mask, soft cap, sink."""


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer that a product reads.

    Attributes:
        node: the product that reads it first.
        tensor: the initializer.
        summed: axis of the tensor that the product sums over, counted from the end.
    """

    node: onnx.NodeProto
    tensor: onnx.TensorProto
    summed: int

    def array(self) -> Array:
        """Return a copy of the weight as ``[…, out, in]``."""
        rows: Array = np.moveaxis(numpy_helper.to_array(self.tensor), self.summed, -1).copy()
        return rows

    def write(self, rows: Array) -> None:
        """Set the weight, given as ``[…, out, in]``."""
        write(self.tensor, np.moveaxis(rows, -1, self.summed))


def write(tensor: onnx.TensorProto, values: Array) -> None:
    """Set an initializer, in its own dtype."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=dtype), tensor.name))


def weights(model: onnx.ModelProto) -> list[Weight]:
    """Return the weights of products in the order of the nodes; each once, and at least one."""
    producer, found_weights = producers(model.graph), dict[str, Weight]()
    initializers = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1}
    experts = {name for name, tensor in initializers.items() if len(tensor.dims) > 2}
    for node in model.graph.node:
        for place, name in enumerate(node.input[:2] if node.op_type in PRODUCTS else ()):
            transposed = bool(attribute(node, ("transA", "transB")[place]))
            weight, summed = _source(producer, experts, name, -2 if (place == 1) != transposed else -1)
            if weight in initializers:
                found_weights.setdefault(weight, Weight(node, initializers[weight], summed))
    if not found_weights:
        raise Inapplicable("no product in the graph reads a weight of its own")
    return list(found_weights.values())


def _source(producer: Mapping[str, onnx.NodeProto], experts: Set[str], name: str, axis: int) -> tuple[str, int]:
    """Follow a value and one of its axes back through transpositions and the choice of experts.

    Returns:
        The name of the source, and the axis there, counted from the end.
    """
    while name in producer:
        node = producer[name]
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


def first_of_last_third(items: Sequence[T]) -> T:
    """Return the first item of the last third of a sequence."""
    return items[2 * len(items) // 3]


def scalar(model: onnx.ModelProto, producer: Mapping[str, onnx.NodeProto], name: str) -> float | None:
    """Return the value of a constant of one element; None for any other value."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.name == name]
    node = producer.get(name)
    if node is not None and node.op_type == "Constant":
        value = attribute(node, "value")
        tensors += [] if value is None else [value]
    values = numpy_helper.to_array(tensors[0]) if tensors else np.zeros(2)
    return float(values.item()) if values.size == 1 else None


def constant(model: onnx.ModelProto, name: str, value: float) -> str:
    """Add a float32 constant, and return its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
    return name


def insert(model: onnx.ModelProto, anchor: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], *, after: bool) -> None:
    """Insert nodes before or after a node."""
    index = list(model.graph.node).index(anchor) + after
    for node in reversed(nodes):
        model.graph.node.insert(index, node)


def insert_after(model: onnx.ModelProto, node: onnx.NodeProto, nodes_between: NodesBetween) -> None:
    """Insert nodes between the first output of a node and all nodes that read it."""
    name = node.output[0]
    node.output[0] = f"{name}.before"
    insert(model, node, nodes_between(node.output[0], name), after=True)


def scaled(model: onnx.ModelProto, node: onnx.NodeProto, factor: float) -> None:
    """Multiply the first output of a node by a number."""
    multiplier = constant(model, f"{node.output[0]}.factor", factor)
    insert_after(model, node, lambda before, after: [helper.make_node("Mul", [before, multiplier], [after])])


def attentions(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Return for each attention the product of queries and keys and the softmax; at least one pair."""
    producer, pairs = producers(model.graph), []
    linear = {weight.node.output[0] for weight in weights(model)}
    for softmax in model.graph.node:
        pending = list(softmax.input) if softmax.op_type == "Softmax" else []
        while pending:
            node = producer.get(pending.pop(0))
            if node is not None and node.op_type == "MatMul":
                if node.output[0] not in linear:  # the softmax of a router has a weight
                    pairs.append((node, softmax))
                break
            if node is not None and node.op_type in AFTER_SCORES:
                pending += node.input
    if not pairs:
        raise Inapplicable("the graph has no softmax behind a product of queries and keys")
    return pairs
