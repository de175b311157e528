# SPDX-License-Identifier: Apache-2.0
"""Refuses dims that depend on data: a program for the card has one fixed shape per value (card-contract §6.7).

A value is known at compile time if its inputs are constants or shapes. Operands that determine dims must be known;
their values are not computed here, as ONNX Runtime folds them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import rejected
from ..graph import shapes_of, subgraphs

# Inputs that determine the dims of the output, by position.
_OPERANDS: dict[str, dict[int, str]] = {
    "CenterCropPad": {1: "shape"},
    "ConstantOfShape": {0: "input"},
    "Expand": {1: "shape"},
    "OneHot": {1: "depth"},
    "Pad": {1: "pads", 3: "axes"},
    "Range": {0: "start", 1: "limit", 2: "delta"},
    "Reshape": {1: "shape"},
    "Resize": {2: "scales", 3: "sizes"},
    "Slice": {1: "starts", 2: "ends", 3: "axes", 4: "steps"},
    "Split": {1: "split"},
    "Squeeze": {1: "axes"},
    "Tile": {1: "repeats"},
    "TopK": {1: "K"},
    "Trilu": {1: "diagonal"},
    "Unsqueeze": {1: "axes"},
}
# Operators whose number of output elements depends on the data.
_SEARCHES = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_Shapes = Mapping[str, tuple[int | None, ...]]
Functions = Mapping[tuple[str, str], Any]
"""FunctionProto by domain and name."""


def check_static(model: Any) -> None:
    """Check that all dims are static and that the operands' shapes fit (§8).

    Args:
        model: ModelProto with inlined functions, on which shape inference has run for concrete input shapes.

    Raises:
        CompileError: a dim depends on data, or shapes do not fit.
    """
    known = {tensor.name for tensor in model.graph.initializer}
    _check(model, model.graph, known, shapes_of(model.graph))


def check_function(model: Any, function: Any, functions: Functions) -> None:
    """Check that the shapes of Expand and Tile are constant inside a function that is compiled as a unit.

    Args:
        model: ModelProto.
        function: FunctionProto.
        functions: all functions of the model: those that it calls belong to the unit.

    Raises:
        CompileError: a shape is not constant.
    """
    for node, name in _data_dependent_in(function, set(), functions):
        if node.op_type in ("Expand", "Tile"):
            why = f"non-constant {name} for {node.op_type} in sub-function {function.name}; leave out -sub-functions"
            raise rejected(model, why, node=node)


def _data_dependent_in(function: Any, known: set[str], functions: Functions) -> Iterator[tuple[Any, str]]:
    for node in function.node:
        called = functions.get((node.domain, node.op_type))
        if called is None:
            yield from _data_dependent([node], known)
            continue
        inside = {formal for formal, name in zip(called.input, node.input, strict=False) if not name or name in known}
        yield from _data_dependent_in(called, inside, functions)
        known.update(name for formal, name in zip(called.output, node.output, strict=False) if formal in inside)


def _check(model: Any, graph: Any, known: set[str], shapes: _Shapes) -> None:
    for node in graph.node:
        _check_shapes(model, node, shapes)
    for node, name in _data_dependent(graph.node, known):
        if node.op_type in _SEARCHES:
            why = f"All dims must be static: those of '{node.output[0]}' depend on data"
        else:
            why = f"{node.op_type}: '{name}' input must be a constant tensor"
        raise rejected(model, f"{why} (node '{node.name or node.output[0]}')", node=node)
    for node in graph.node:
        for inner in subgraphs(node):
            _check(model, inner, known | {t.name for t in inner.initializer}, {**shapes, **shapes_of(inner)})


def _data_dependent(nodes: Any, known: set[str]) -> Iterator[tuple[Any, str]]:
    """Yield the nodes whose output dims depend on data, and the responsible input; add the known values to `known`."""
    for node in nodes:
        if node.domain in ("", "ai.onnx"):
            for index, name in _OPERANDS.get(node.op_type, {}).items():
                if index < len(node.input) and node.input[index] and node.input[index] not in known:
                    yield node, name
        if node.op_type in ("Shape", "Size") or computed_once(node, known):
            known.update(node.output)
        elif node.op_type in _SEARCHES:
            yield node, ""


def computed_once(node: Any, known: Collection[str]) -> bool:
    """Return True if a node's outputs are known at compile time, given the names of known values."""
    if node.op_type in _RANDOM or subgraphs(node):
        return False
    return all(not name or name in known for name in node.input)


def _check_shapes(model: Any, node: Any, shapes: _Shapes) -> None:
    operands = [shapes.get(name) for name in node.input]
    if node.op_type == "Trilu" and len(operands) > 1 and operands[1]:
        raise rejected(model, "Diagonal must be scalar\nFunction verification failed", node=node)
    if node.op_type not in ("ScatterND", "ScatterElements"):
        return
    data, indices, updates = operands
    if data is None or updates is None or not indices or None in (*data, *indices, *updates):
        return
    count = int(indices[-1] or 0)
    expected = indices if node.op_type == "ScatterElements" else (*indices[:-1], *data[count:])
    if updates != expected:
        why = f"Indices and updates must have same lengths! Updates have shape {list(updates)}, not {list(expected)}"
        raise rejected(model, why, node=node)
