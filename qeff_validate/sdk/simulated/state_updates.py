# SPDX-License-Identifier: Apache-2.0
"""Which retained states a graph updates by writing into them, so that a runtime need not copy the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .graph import STANDARD, names_read

_WRITES = ("ScatterElements", "ScatterND")


def in_place_states(graph: Any, retained: Mapping[str, str]) -> list[str]:
    """Return the inputs of which the state output may have the memory.

    The output is a scatter into the input, and nothing reads the input that the scatter does not wait for. With the
    same memory on both sides, ONNX Runtime's scatters write the new elements and copy nothing.

    Args:
        graph: GraphProto; ONNX Runtime runs its nodes one after the other.
        retained: the output that replaces each state, by the name of the input.
    """
    makers = {name: node for node in graph.node for name in node.output if name}
    readers: dict[str, list[Any]] = {name: [] for name in retained}
    for node in graph.node:
        for name in names_read(node) if node.op_type != "Shape" else ():
            if name in readers:
                readers[name].append(node)
    outputs = {info.name for info in graph.output}
    found = []
    for name, twin in retained.items():
        write = makers.get(twin)
        if write is None or write.op_type not in _WRITES or write.domain not in STANDARD:
            continue
        others = [node for node in readers[name] if node is not write]
        once = list(write.input).count(name) == 1 and write.input[0] == name
        if once and name not in outputs and _all_before(others, write, makers):
            found.append(name)
    return found


def _all_before(nodes: Iterable[Any], last: Any, makers: Mapping[str, Any]) -> bool:
    """Return True if a node needs results of each of these nodes."""
    missing = {id(node) for node in nodes}
    seen: set[int] = set()
    waiting = [last]
    while waiting and missing:
        for name in names_read(waiting.pop()):
            maker = makers.get(name)
            if maker is not None and id(maker) not in seen:
                seen.add(id(maker))
                missing.discard(id(maker))
                waiting.append(maker)
    return not missing
