# SPDX-License-Identifier: Apache-2.0
"""Which nodes compute in float32, and which in fp16 (card-contract §6.1, §6.4).

A node in float32 reads unrounded values where there are some, and hands its own on unrounded to others in
float32; nodes in fp16 read the rounded value. Names of nodes decide before types of operators do, and both
before `-convert-to-fp16`. A weight that is too large to stay in the graph is rounded as soon as one node in fp16
reads it, and so is what a branch of an If or a Loop hands out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CompileError
from ..graph import nodes_of

# Values inside of CustomRMSNorm. The compiler knows it as one operator, so nothing is rounded in there.
WIDE = "sim.wide:"
_KEYS = ("FP16NodeInstanceNames", "FP32NodeInstanceNames")


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice: names are the first outputs of nodes, operators their types."""

    fp16: bool = True
    fp16_names: frozenset[str] = frozenset()
    fp32_names: frozenset[str] = frozenset()
    fp16_ops: frozenset[str] = frozenset()
    fp32_ops: frozenset[str] = frozenset()

    @property
    def rounds(self) -> bool:
        """Whether any node is in fp16 at all."""
        return self.fp16 or bool(self.fp16_names or self.fp16_ops)

    def hands_on(self, node: Any) -> bool:
        """Tells whether what a node computes in float32 is handed on without rounding."""
        name = next((output for output in node.output if output), "")
        if name.startswith(WIDE) or name in self.fp32_names:
            return True
        if name in self.fp16_names:
            return False
        return node.op_type in self.fp32_ops or not (self.fp16 or node.op_type in self.fp16_ops)

    def keeps(self, node: Any) -> bool:
        """Tells whether a node is in float32 because it is named, by itself or by its type."""
        name = next((output for output in node.output if output), "")
        return self.hands_on(node) and (self.rounds or name in self.fp32_names or node.op_type in self.fp32_ops)

    def is_wide(self, node: Any) -> bool:
        """Tells whether a node computes in float32; the last node of CustomRMSNorm does, and rounds."""
        return self.hands_on(node) or any(name.startswith(WIDE) for name in node.input)

    def kept(self, graph: Any) -> set[str]:
        """Returns the names of all values that nodes hand on without rounding."""
        return {name for node in nodes_of(graph) if self.hands_on(node) and not _constant(node) for name in node.output}

    def readable(self, graph: Any) -> set[str]:
        """Returns the names of all values that have an unrounded form, if they are float32, which some node reads."""
        streamed = {tensor.name for tensor in graph.initializer if tensor.data_location}
        there = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
        there |= {name for node in graph.node if _constant(node) for name in node.output}
        there |= self.kept(graph)
        return (there - streamed) & {name for node in nodes_of(graph) if self.is_wide(node) for name in node.input}

    def unrounded_weights(self, graph: Any) -> set[str]:
        """Returns the names that no node in fp16 reads, so that a weight of this name is left as it is."""
        nodes = list(nodes_of(graph))
        narrow = {name for node in nodes if not self.is_wide(node) for name in node.input}
        return {name for node in nodes for name in node.input} - narrow


def plan(fp16: bool, path: Path | None, fp16_ops: Collection[str], fp32_ops: Collection[str]) -> Plan:
    """Reads the node precision file, if there is one, and returns the choice.

    Raises:
        CompileError: The file is missing or not of the form of card-contract §6.4, or it contradicts itself.
    """
    lists = dict.fromkeys(_KEYS, frozenset[str]()) if path is None else _read(path)
    fp16_names, fp32_names = (lists[key] for key in _KEYS)
    if both := fp16_names & fp32_names or frozenset(fp16_ops) & frozenset(fp32_ops):
        raise CompileError(f"'{min(both)}' is to be in FP16 and in FP32; name it once")
    return Plan(fp16, fp16_names, fp32_names, frozenset(fp16_ops), frozenset(fp32_ops))


def unknown(choice: Plan, graph: Any) -> Iterator[str]:
    """Yields a warning for the names and for the operators that the graph has no node for."""
    nodes = list(nodes_of(graph))
    named = choice.fp16_names | choice.fp32_names
    if missing := sorted(named - {node.output[0] for node in nodes if node.output}):
        yield f"no node has the first output {', '.join(missing)}; the node precision info does not apply to it"
    operators = choice.fp16_ops | choice.fp32_ops
    if absent := sorted(operators - {node.op_type for node in nodes}):
        yield f"the model has no operator {', '.join(absent)}"


def _read(path: Path) -> dict[str, frozenset[str]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: node precision info is missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompileError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) - set(_KEYS):
        raise CompileError(f"{path} has the lists {' and '.join(_KEYS)}, and nothing else")
    lists = {}
    for key in _KEYS:
        names = content.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise CompileError(f"{path}: {key} must be a list of names")
        lists[key] = frozenset(str(name) for name in names)
    return lists


def _constant(node: Any) -> bool:
    return node.op_type in ("Constant", "ConstantOfShape")
