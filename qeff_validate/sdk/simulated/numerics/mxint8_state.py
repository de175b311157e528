# SPDX-License-Identifier: Apache-2.0
"""Retained state in MXINT8 (custom IO `mxint8`): what is written to the card is what MXINT8 leaves of it.

The memory holds the decompressed numbers, as fp16: each of them is an fp16 number if the graph computes in fp16. Within
the graph all that reads the written state reads those numbers too, in the same inference already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..graph import FLOAT
from . import microscaling
from .fp16_rounding import cast, moves


def quantize_writes(graph: Any, states: Mapping[str, tuple[str, int]], types: Mapping[str, int]) -> None:
    """Puts MXINT8 before or behind what writes each state, in place.

    Args:
        graph: GraphProto, already rounded.
        states: Input X to the output X_RetainedState, and their last dim; blocks lie along it.
        types: Element types of values.
    """
    for state, (twin, width) in states.items():
        made_by = {name: node for node in graph.node for name in node.output}
        value, writer = _source(twin, made_by)
        if value == state:
            continue  # nothing is written
        whole = writer is not None and _writes_rows(graph, writer) and _source(writer.input[0], made_by)[0] == state
        if writer is not None and whole:
            # A row of the state is written whole or not at all, so to compress the new rows is enough.
            rows, writer.input[2] = writer.input[2], f"{twin}/sim.rows"
            _insert(graph, rows, f"{twin}/sim.rows", width, types[state])
        else:
            _replace(graph, value, width, types[state])


def _source(value: str, made_by: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns where a value comes from, through nodes that leave its last dim in its place, and the node there."""
    node = made_by.get(value)
    while node is not None and (node.op_type == "Identity" or _keeps_rows(node)):
        value, node = node.input[0], made_by.get(node.input[0])
    return value, node


def _keeps_rows(node: Any) -> bool:
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
    return bool(node.op_type == "Transpose" and perm and perm[-1] == len(perm) - 1)


def _writes_rows(graph: Any, node: Any) -> bool:
    """Tells whether a ScatterND writes along whole last dims: its indices are shorter than the state's rank."""
    if node.op_type != "ScatterND" or not moves(node):
        return False
    dims = {info.name: info.type.tensor_type.shape.dim for info in (*graph.value_info, *graph.input)}
    rank, index = len(dims.get(node.input[0], ())), dims.get(node.input[1], ())
    return bool(rank and index and 0 < index[-1].dim_value < rank)


def _insert(graph: Any, source: str, target: str, width: int, kind: int) -> None:
    """Adds the nodes from one value to another behind the node that the first comes from."""
    wide = (source, target) if kind == FLOAT else (f"{target}/sim.wide", f"{target}/sim.compressed")
    nodes, constants = microscaling.mxint8_nodes(*wide, width)
    if kind != FLOAT:
        nodes = [cast(source, wide[0], FLOAT), *nodes, cast(wide[1], target, kind)]
    graph.initializer.extend(constants)
    at = next((i for i, node in enumerate(graph.node) if source in node.output), -1) + 1
    ordered = [*graph.node[:at], *nodes, *graph.node[at:]]
    del graph.node[:]
    graph.node.extend(ordered)


def _replace(graph: Any, value: str, width: int, kind: int) -> None:
    """Lets everybody who reads a value read what MXINT8 leaves of it; an input is compressed under another name."""
    raw = f"{value}/sim.raw"
    made = next((node for node in graph.node if value in node.output), None)
    if made is not None:
        made.output[:] = [raw if name == value else name for name in made.output]
        _insert(graph, raw, value, width, kind)
        return
    for node in graph.node:
        node.input[:] = [f"{value}/sim.mx" if name == value else name for name in node.input]
    _insert(graph, value, f"{value}/sim.mx", width, kind)
