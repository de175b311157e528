# SPDX-License-Identifier: Apache-2.0
"""The precision of each node, float32 or fp16 (card-contract §6.1, §6.4).

A node in float32 reads unrounded values where they exist, and its outputs are unrounded for other nodes in float32;
nodes in fp16 read the rounded values. Names of nodes take precedence over types of operators, and both over
`-convert-to-fp16`. A weight that is too large to stay in the graph is rounded if any node in fp16 reads it, and so is
the output of a branch of an If or of a Loop.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CompileError
from ..graph import nodes_of

FLOAT32_PREFIX = "sim.wide:"
"""Prefix of values inside of CustomRMSNorm: the compiler treats it as one operator, so they are not rounded."""
_KEYS = ("FP16NodeInstanceNames", "FP32NodeInstanceNames")


@dataclass(frozen=True, slots=True)
class Plan:
    """The nodes in fp16 and in float32.

    Attributes:
        fp16: ``-convert-to-fp16``: the precision of nodes that are not listed.
        fp16_names: first outputs of nodes in fp16.
        fp32_names: first outputs of nodes in float32.
        fp16_ops: operator types in fp16.
        fp32_ops: operator types in float32.
    """

    fp16: bool = True
    fp16_names: frozenset[str] = frozenset()
    fp32_names: frozenset[str] = frozenset()
    fp16_ops: frozenset[str] = frozenset()
    fp32_ops: frozenset[str] = frozenset()

    @property
    def rounds(self) -> bool:
        """True if any node is in fp16."""
        return self.fp16 or bool(self.fp16_names or self.fp16_ops)

    def has_unrounded_outputs(self, node: Any) -> bool:
        """Return True if the outputs of a node are not rounded."""
        name = next((output for output in node.output if output), "")
        if name.startswith(FLOAT32_PREFIX) or name in self.fp32_names:
            return True
        if name in self.fp16_names:
            return False
        return node.op_type in self.fp32_ops or not (self.fp16 or node.op_type in self.fp16_ops)

    def is_listed_float32(self, node: Any) -> bool:
        """Return True if a node is in float32 because its name or its type is listed."""
        name = next((output for output in node.output if output), "")
        return self.has_unrounded_outputs(node) and (
            self.rounds or name in self.fp32_names or node.op_type in self.fp32_ops
        )

    def computes_in_float32(self, node: Any) -> bool:
        """Return True if a node computes in float32; the last node of CustomRMSNorm does, and its output is rounded."""
        return self.has_unrounded_outputs(node) or any(name.startswith(FLOAT32_PREFIX) for name in node.input)

    def unrounded_values(self, graph: Any) -> set[str]:
        """Return the names of all node outputs that are not rounded."""
        return {
            name
            for node in nodes_of(graph)
            if self.has_unrounded_outputs(node) and not _constant(node)
            for name in node.output
        }

    def readable(self, graph: Any) -> set[str]:
        """Return the names of all values with an unrounded form that some node reads, if they are float32."""
        streamed = {tensor.name for tensor in graph.initializer if tensor.data_location}
        available = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
        available |= {name for node in graph.node if _constant(node) for name in node.output}
        available |= self.unrounded_values(graph)
        return (available - streamed) & {
            name for node in nodes_of(graph) if self.computes_in_float32(node) for name in node.input
        }

    def unrounded_weights(self, graph: Any) -> set[str]:
        """Return the names that no node in fp16 reads; a weight with such a name is not rounded."""
        nodes = list(nodes_of(graph))
        in_fp16 = {name for node in nodes if not self.computes_in_float32(node) for name in node.input}
        return {name for node in nodes for name in node.input} - in_fp16


def plan(fp16: bool, path: Path | None, fp16_ops: Collection[str], fp32_ops: Collection[str]) -> Plan:
    """Return the precision of the nodes.

    Args:
        fp16: ``-convert-to-fp16``.
        path: the node precision file; None if there is none.
        fp16_ops: operator types in fp16.
        fp32_ops: operator types in float32.

    Raises:
        CompileError: the file is missing or not of the form of card-contract §6.4, or it contradicts itself.
    """
    lists = dict.fromkeys(_KEYS, frozenset[str]()) if path is None else _read(path)
    fp16_names, fp32_names = (lists[key] for key in _KEYS)
    if both := fp16_names & fp32_names or frozenset(fp16_ops) & frozenset(fp32_ops):
        raise CompileError(f"'{min(both)}' is to be in FP16 and in FP32; name it once")
    return Plan(fp16, fp16_names, fp32_names, frozenset(fp16_ops), frozenset(fp32_ops))


def unknown_names(plan: Plan, graph: Any) -> Iterator[str]:
    """Yield a warning for listed names and one for listed operators that are not in the graph."""
    nodes = list(nodes_of(graph))
    named = plan.fp16_names | plan.fp32_names
    if missing := sorted(named - {node.output[0] for node in nodes if node.output}):
        yield f"no node has the first output {', '.join(missing)}; the node precision info does not apply to it"
    operators = plan.fp16_ops | plan.fp32_ops
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
