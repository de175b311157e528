# SPDX-License-Identifier: Apache-2.0
"""Patterns of nodes in ONNX graphs: rotary angles, root mean squares, and products of integers.

Patterns are recognized by operators and inputs, never by node names, so the graphs of both exporters are supported.
Nothing here changes a graph. The compiler's inputs and the graph mutants are derived from the same patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, NodeProto, TensorProto, helper

INTEGERS = (TensorProto.INT64, TensorProto.INT32)
AFTER_MEAN = ("Add", "Sqrt", "Reciprocal")
"""Operators between the mean of squares and its (inverse) root; the sum is with the epsilon."""


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Return the node that computes each value, by the name of the value."""
    return {name: node for node in graph.node for name in node.output}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Return the nodes that read each value, by the name of the value."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def attribute(node: NodeProto, name: str) -> Any:
    """Return an attribute's value; None if the node does not have it."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def rotary_angles(graph: GraphProto) -> list[str]:
    """Return the first outputs of the nodes that compute the sines and cosines of rotary embeddings.

    These are the sines and cosines themselves and all nodes before them, back to inputs, initializers and casts to
    integers.
    """
    producer = producers(graph)
    angles: dict[str, None] = {}
    pending = [node for node in graph.node if node.op_type in ("Sin", "Cos") and node.output]
    while pending:
        node = pending.pop()
        if node.output[0] not in angles and not (node.op_type == "Cast" and attribute(node, "to") in INTEGERS):
            angles[node.output[0]] = None
            pending += [producer[name] for name in node.input if name in producer]
    return list(angles)


def integer_products(graph: GraphProto) -> Iterator[str]:
    """Yield the first outputs of the nodes that quantize operands of integer products and scale their sums back.

    These are the casts of sums to float32, the products with a scale that read them, the products of both scales, and
    the dynamic quantization before: all that has a number of the size of a sum or of a scale.
    """
    producer, readers = producers(graph), consumers(graph)
    for node in graph.node:
        if node.op_type not in ("MatMulInteger", "ConvInteger"):
            continue
        source = producer.get(node.input[0])
        if source is not None and source.op_type == "DynamicQuantizeLinear":
            yield source.output[0]
        for sums in readers.get(node.output[0], ()):
            if sums.op_type != "Cast" or attribute(sums, "to") != TensorProto.FLOAT:
                continue
            yield sums.output[0]
            for scaled in readers.get(sums.output[0], ()):
                if scaled.op_type == "Mul":
                    scales = (producer.get(name) for name in scaled.input if name != sums.output[0])
                    yield from (scale.output[0] for scale in scales if scale is not None and scale.op_type == "Mul")
                    yield scaled.output[0]


@dataclass(frozen=True, slots=True)
class RootMeanSquare:
    """The root of a mean of squares, as in RMSNorm and in a decomposed LayerNorm.

    Attributes:
        square: ``Pow(x, …)`` or ``Mul(x, x)``.
        mean: ``ReduceMean`` of the square.
        steps: the nodes after the mean, in order: the sum with the epsilon, the root, its reciprocal, as far as each
            is the only reader of the one before.
    """

    square: NodeProto
    mean: NodeProto
    steps: tuple[NodeProto, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """First outputs of all nodes."""
        return tuple(node.output[0] for node in (self.square, self.mean, *self.steps))

    @property
    def epsilon_sum(self) -> NodeProto | None:
        """The node that adds the epsilon; None if there is none, or no root of the sum."""
        operators = [step.op_type for step in self.steps[:2]]
        return self.steps[0] if operators == ["Add", "Sqrt"] else None


def root_mean_squares(graph: GraphProto) -> Iterator[RootMeanSquare]:
    """Yield the root mean squares of a graph in the order of their means."""
    producer, readers = producers(graph), consumers(graph)
    for mean in graph.node:
        square = producer.get(mean.input[0]) if mean.op_type == "ReduceMean" and mean.input else None
        if square is not None and mean.output and _is_square(square):
            yield RootMeanSquare(square, mean, tuple(_steps(mean, readers)))


def _is_square(node: NodeProto) -> bool:
    return node.op_type == "Pow" or (node.op_type == "Mul" and len(node.input) == 2 and node.input[0] == node.input[1])


def _steps(mean: NodeProto, readers: Mapping[str, list[NodeProto]]) -> Iterator[NodeProto]:
    visited = {mean.output[0]}
    node = mean
    while True:
        following = [reader for reader in readers.get(node.output[0], []) if reader.op_type in AFTER_MEAN]
        if len(following) != 1 or not following[0].output or following[0].output[0] in visited:  # an invalid graph
            return
        (node,) = following
        visited.add(node.output[0])
        yield node
