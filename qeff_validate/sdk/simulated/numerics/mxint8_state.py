# SPDX-License-Identifier: Apache-2.0
"""Retained state in MXINT8 (custom IO `mxint8`): values are rounded to MXINT8 when they are written to the state.

The memory contains the decompressed values as fp16, which is exact if the graph computes in fp16. Nodes that read the
written state read the rounded values too, in the same inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..graph import FLOAT
from . import microscaling
from .fp16_rounding import cast, moves


def quantize_writes(graph: Any, states: Mapping[str, tuple[str, int]], types: Mapping[str, int]) -> None:
    """Insert MXINT8 rounding where each state is written, in place.

    Args:
        graph: GraphProto, already rounded.
        states: for each input X, the output X_RetainedState and their last dim; blocks lie along it.
        types: element types of values.
    """
    for state, (twin, width) in states.items():
        producers = {name: node for node in graph.node for name in node.output}
        value, writer = _source(twin, producers)
        if value == state:
            continue  # nothing is written
        whole = writer is not None and _writes_rows(graph, writer) and _source(writer.input[0], producers)[0] == state
        if writer is not None and whole:
            # A row of the state is written completely or not at all, so compressing the new rows is enough.
            rows, writer.input[2] = writer.input[2], f"{twin}/sim.rows"
            _insert(graph, rows, f"{twin}/sim.rows", width, types[state])
        else:
            _replace(graph, value, width, types[state])


def _source(value: str, producers: Mapping[str, Any]) -> tuple[str, Any]:
    """Follow a value back through Identity and transpositions that keep its last dim; return name and producer."""
    node = producers.get(value)
    while node is not None and (node.op_type == "Identity" or _keeps_rows(node)):
        value, node = node.input[0], producers.get(node.input[0])
    return value, node


def _keeps_rows(node: Any) -> bool:
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
    return bool(node.op_type == "Transpose" and perm and perm[-1] == len(perm) - 1)


def _writes_rows(graph: Any, node: Any) -> bool:
    """Return True if a ScatterND writes complete last dims: its indices are shorter than the state's rank."""
    if node.op_type != "ScatterND" or not moves(node):
        return False
    dims = {info.name: info.type.tensor_type.shape.dim for info in (*graph.value_info, *graph.input)}
    rank, index = len(dims.get(node.input[0], ())), dims.get(node.input[1], ())
    return bool(rank and index and 0 < index[-1].dim_value < rank)


def _insert(graph: Any, source: str, target: str, width: int, kind: int) -> None:
    """Insert MXINT8 nodes from one value to another, after the producer of the first.

    Args:
        graph: GraphProto.
        source: name of the value.
        target: name of the result.
        width: last dim of the value.
        kind: element type of the value.
    """
    wide = (source, target) if kind == FLOAT else (f"{target}/sim.wide", f"{target}/sim.compressed")
    nodes, constants = microscaling.mxint8_nodes(*wide, width)
    if kind != FLOAT:
        nodes = [cast(source, wide[0], FLOAT), *nodes, cast(wide[1], target, kind)]
    graph.initializer.extend(constants)
    index = next((i for i, node in enumerate(graph.node) if source in node.output), -1) + 1
    ordered = [*graph.node[:index], *nodes, *graph.node[index:]]
    del graph.node[:]
    graph.node.extend(ordered)


def _replace(graph: Any, value: str, width: int, kind: int) -> None:
    """Round a value to MXINT8 for all its readers; the result gets a new name if the value is an input."""
    raw = f"{value}/sim.raw"
    producer = next((node for node in graph.node if value in node.output), None)
    if producer is not None:
        producer.output[:] = [raw if name == value else name for name in producer.output]
        _insert(graph, raw, value, width, kind)
        return
    for node in graph.node:
        node.input[:] = [f"{value}/sim.mx" if name == value else name for name in node.input]
    _insert(graph, value, f"{value}/sim.mx", width, kind)
