# SPDX-License-Identifier: Apache-2.0
"""Reading and renaming in ONNX graphs: nodes, subgraphs, element types and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Dims = tuple[int, ...]
"""The static shape of a value."""

STANDARD = ("", "ai.onnx")
"""Names of the domain of the standard operators."""

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
"""Element types, as `onnx.TensorProto.DataType` numbers them; this module needs no import of onnx."""


def opset_of(model: Any) -> int:
    """Return the opset version of the standard operators in a ModelProto."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD), default=1)


def subgraphs(node: Any) -> list[Any]:
    """Return the graphs among a node's attributes: the branches of an If, the body of a Loop or Scan."""
    return [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else []) + list(a.graphs)]


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a GraphProto or FunctionProto, those of subgraphs included."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from nodes_of(inner)


def names_read(node: Any) -> Iterator[str]:
    """Yield the values that a node reads, those that its subgraphs read and return included."""
    yield from node.input
    for inner in subgraphs(node):
        for part in inner.node:
            yield from names_read(part)
        yield from (info.name for info in inner.output)


def rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values in all nodes of a graph and of its subgraphs, in place."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in subgraphs(node):
            # ONNX forbids a subgraph to redefine an outer name, so the same name is the outer value.
            rename(inner, names)
            for info in inner.output:
                info.name = names.get(info.name, info.name)


def value_types(graph: Any, outer: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the element type of every value of a graph.

    Args:
        graph: GraphProto on which shape inference has run.
        outer: the types of the values of the enclosing graphs.
    """
    types = dict(outer or {})
    types.update({t.name: t.data_type for t in graph.initializer})
    for info in (*graph.input, *graph.value_info, *graph.output):
        # A sequence or optional has no element type of its own, but its type is known.
        if info.type.tensor_type.elem_type or info.type.WhichOneof("value") not in (None, "tensor_type"):
            types[info.name] = info.type.tensor_type.elem_type
    return types


def shapes_of(graph: Any) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of a graph's values by name; None stands for an unknown dim."""
    shapes: dict[str, tuple[int | None, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            shapes[info.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                shapes[node.output[0]] = tuple(attribute.t.dims)
    return shapes
