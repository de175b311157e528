# SPDX-License-Identifier: Apache-2.0
"""A part of a graph as a model of its own, with what it is fed and what it should give."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qeff_validate.explain.graph_values import GraphValues, reads
from qeff_validate.tensors import Array

LARGE_TABLE = 1 << 16
"""Bytes of an embedding table from which only the rows that are read are kept."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a graph that stands alone.

    Attributes:
        model: ModelProto with its weights inside and fixed shapes.
        inputs: content of its inputs: the original model's values, and feeds of the graph.
        output: name of its one output.
        expected: what the original model gives there, float64.
        tokens: bool mask of the leading dims of ``expected`` that hold tokens; None: all of it counts.
        rows: texts that are run.
        length: their padded length, in tokens.
    """

    model: Any
    inputs: Mapping[str, Array]
    output: str
    expected: Any
    tokens: Array | None
    rows: int
    length: int

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self.model.graph.node)


def sources(graph: GraphValues, output: str, stops: Collection[str]) -> set[str]:
    """Return the stops and the inputs of the graph that the block of a value reads."""
    names = {name for node in graph.block(output, set(stops)) for name in reads(node)}
    return names & {*stops, *graph.inputs}


def block_model(graph: GraphValues, output: str, inputs: Mapping[str, Array], like: Array) -> Any:
    """Return the nodes between some values and a value as a model, with the weights that they read.

    Args:
        graph: the graph.
        output: the value.
        inputs: content of the values at which it ends and of the graph's inputs; those that it does not read are left
            out.
        like: an array with dtype and shape of the value.
    """
    nodes = []
    for node in graph.block(output, set(inputs)):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.metadata_props[:]
        copy.doc_string = ""
        copy.output[:] = [f"{name}/unused" if name in inputs and name != output else name for name in copy.output]
        nodes.append(copy)
    names = {name for node in nodes for name in reads(node)}
    weights = [numpy_helper.from_array(array, name) for name, array in graph.weights.items() if name in names]
    made = helper.make_graph(
        nodes,
        "block",
        [_info(name, array) for name, array in inputs.items() if name in names],
        [_info(output, like)],
        weights,
    )
    imports = [helper.make_opsetid(entry.domain, entry.version) for entry in graph.model.opset_import]
    return helper.make_model(made, opset_imports=imports, ir_version=graph.model.ir_version)


def with_used_rows(graph: GraphValues, block: Block) -> Block:
    """Return a block whose large embedding tables hold only the rows that are read, with indices to match."""
    model, inputs = onnx.ModelProto(), dict(block.inputs)
    model.CopyFrom(block.model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    gathers = [
        node
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in weights
        and len(weights[node.input[0]].raw_data) > LARGE_TABLE
        and all(entry.name != "axis" or entry.i == 0 for entry in node.attribute)
        and sum(node.input[0] in reads(other) for other in model.graph.node) == 1
    ]
    if not gathers:
        return block
    indices = _values(graph, block, {node.input[1] for node in gathers})
    for node in gathers:
        table = numpy_helper.to_array(weights[node.input[0]])
        own = np.where(indices[node.input[1]] < 0, indices[node.input[1]] + len(table), indices[node.input[1]])
        used, places = np.unique(own, return_inverse=True)
        kept = np.ascontiguousarray(table[used])
        weights[node.input[0]].CopyFrom(numpy_helper.from_array(kept, node.input[0]))
        name = f"{node.input[1]}/rows of {node.input[0]}"
        inputs[name] = places.reshape(own.shape).astype(np.int64)
        model.graph.input.append(_info(name, inputs[name]))
        node.input[1] = name
    kept_inputs = _without_unread(model, block.output)
    return Block(
        model,
        {name: array for name, array in inputs.items() if name in kept_inputs},
        block.output,
        block.expected,
        block.tokens,
        block.rows,
        block.length,
    )


def _values(graph: GraphValues, block: Block, names: set[str]) -> dict[str, Any]:
    """Return the content of values inside a block, of any dtype."""
    known = {name: block.inputs[name] for name in names if name in block.inputs}
    constants = {tensor.name: tensor for tensor in block.model.graph.initializer}
    known |= {name: numpy_helper.to_array(constants[name]) for name in names if name in constants}
    inner = [name for name in names if name not in known]
    if not inner:
        return known
    model = onnx.ModelProto()
    model.CopyFrom(block.model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    _without_unread(model, *inner)
    read = {value.name for value in model.graph.input}
    feeds = {name: array for name, array in block.inputs.items() if name in read}
    return {**known, **graph.run_model(model, feeds, inner)}


def _without_unread(model: Any, *outputs: str) -> set[str]:
    """Leave out the nodes, initializers and inputs that some outputs do not need; return the names of the inputs."""
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(reads(node))
    for repeated, items in (
        (model.graph.node, kept[::-1]),
        (model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in needed]),
        (model.graph.input, [value for value in model.graph.input if value.name in needed]),
    ):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del repeated[:]
        repeated.extend(copies)
    return {value.name for value in model.graph.input}


def _info(name: str, array: Array) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
