# SPDX-License-Identifier: Apache-2.0
"""Refuses dims that depend on data: a program for the card has one fixed shape per value (card-contract §6.7).

A value is known when the model is compiled if only constants and shapes go into it. Operands that decide about
dims must be known; what is known is not computed here, ONNX Runtime folds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import rejected
from ..graph import shapes_of, subgraphs

# Inputs that decide about the output's dims, by position.
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
# Operators whose output has as many elements as the data makes them find.
_SEARCHES = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_Shapes = Mapping[str, tuple[int | None, ...]]
Functions = Mapping[tuple[str, str], Any]
"""FunctionProto by domain and name."""


def check_static(model: Any) -> None:
    """Raises CompileError if a dim depends on data, or if operands' concrete shapes do not fit (§8).

    Args:
        model: ModelProto with inlined functions, on which shape inference has run for concrete input shapes.
    """
    known = {tensor.name for tensor in model.graph.initializer}
    _check(model, model.graph, known, shapes_of(model.graph))


def check_function(model: Any, function: Any, functions: Functions) -> None:
    """Raises CompileError for an Expand or Tile that is not constant inside of a function that is kept as a unit.

    Args:
        model: ModelProto.
        function: FunctionProto.
        functions: All of the model: those that it calls belong to the unit.
    """
    for node, name in _undecided_in(function, set(), functions):
        if node.op_type in ("Expand", "Tile"):
            why = f"non-constant {name} for {node.op_type} in sub-function {function.name}; leave out -sub-functions"
            raise rejected(model, why, node=node)


def _undecided_in(function: Any, known: set[str], functions: Functions) -> Iterator[tuple[Any, str]]:
    for node in function.node:
        called = functions.get((node.domain, node.op_type))
        if called is None:
            yield from _undecided([node], known)
            continue
        inside = {formal for formal, name in zip(called.input, node.input, strict=False) if not name or name in known}
        yield from _undecided_in(called, inside, functions)
        known.update(name for formal, name in zip(called.output, node.output, strict=False) if formal in inside)


def _check(model: Any, graph: Any, known: set[str], shapes: _Shapes) -> None:
    for node in graph.node:
        _check_shapes(model, node, shapes)
    for node, name in _undecided(graph.node, known):
        if node.op_type in _SEARCHES:
            why = f"All dims must be static: those of '{node.output[0]}' depend on data"
        else:
            why = f"{node.op_type}: '{name}' input must be a constant tensor"
        raise rejected(model, f"{why} (node '{node.name or node.output[0]}')", node=node)
    for node in graph.node:
        for inner in subgraphs(node):
            _check(model, inner, known | {t.name for t in inner.initializer}, {**shapes, **shapes_of(inner)})


def _undecided(nodes: Any, known: set[str]) -> Iterator[tuple[Any, str]]:
    """Yields the nodes whose output dims depend on data, and the input that does it; adds to `known` on the way."""
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
    """Tells whether a node's values are known when the model is compiled, if these are."""
    if node.op_type in _RANDOM or subgraphs(node):
        return False
    return all(not name or name in known for name in node.input)


def _check_shapes(model: Any, node: Any, shapes: _Shapes) -> None:
    found = [shapes.get(name) for name in node.input]
    if node.op_type == "Trilu" and len(found) > 1 and found[1]:
        raise rejected(model, "Diagonal must be scalar\nFunction verification failed", node=node)
    if node.op_type not in ("ScatterND", "ScatterElements"):
        return
    data, indices, updates = found
    if data is None or updates is None or not indices or None in (*data, *indices, *updates):
        return
    count = int(indices[-1] or 0)
    want = indices if node.op_type == "ScatterElements" else (*indices[:-1], *data[count:])
    if updates != want:
        why = f"Indices and updates must have same lengths! Updates have shape {list(updates)}, not {list(want)}"
        raise rejected(model, why, node=node)
