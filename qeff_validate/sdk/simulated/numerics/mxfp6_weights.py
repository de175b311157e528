# SPDX-License-Identifier: Apache-2.0
"""`-mxfp6-matmul`: the constant weights of MatMul and Gemm become what MXFP6 leaves of them (card-contract §7).

A weight is an initializer that a MatMul or Gemm reads, directly or through Transpose and Identity; blocks lie along the
dim that is summed over. Whoever else reads it (a tied embedding, a node that is named to be in float32) keeps the
weight as it is, so it is stored twice then. The QPC holds the decompressed numbers, in the type of the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..graph import STANDARD, nodes_of
from ..weights import CHUNK, Weight
from . import microscaling
from .node_precision import Plan

_FLOAT, _FLOAT16, _BFLOAT16 = (
    int(onnx.TensorProto.FLOAT),
    int(onnx.TensorProto.FLOAT16),
    int(onnx.TensorProto.BFLOAT16),
)
_ITEMSIZE = {_FLOAT: 4, _FLOAT16: 2, _BFLOAT16: 2}


@dataclass(frozen=True, slots=True)
class _Use:
    """A weight as an operand: the node, which of its inputs, and the nodes between, from the operand on."""

    node: Any
    operand: int
    tensor: Any
    axis: int
    between: Sequence[Any]


def compress(graph: Any, weights: list[Weight], plan: Plan) -> int:
    """Compresses in place, and returns the number of weights; shape inference must have run on the graph."""
    streamed = {weight.name: weight for weight in weights}
    infos = {info.name: info for info in graph.value_info}
    uses = list(_uses(graph, plan))
    made: set[str] = set()
    between: list[Any] = []
    for use in uses:
        end = f"/sim.mxfp6.{use.axis}"
        name = use.tensor.name + end
        if name not in made:
            _add(graph, use, name, streamed.get(use.tensor.name), weights)
        for node in reversed(use.between):
            made.add(name)
            before, name = name, node.output[0] + end
            if name not in made:
                between.append(_copy(node, output=[name], input=[before]))
                graph.value_info.extend(_copy(infos[n], name=name) for n in node.output if n in infos)
        made.add(name)
        use.node.input[use.operand] = name
    nodes = [*between, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unread(graph, weights, uses)
    return len({use.tensor.name for use in uses})


def _copy(message: Any, **fields: Any) -> Any:
    """Returns a copy of a message with other names in it."""
    copy = type(message)()
    copy.CopyFrom(message)
    for field, value in fields.items():
        if isinstance(value, list):
            getattr(copy, field)[:] = value
        else:
            setattr(copy, field, value)
    return copy


def _uses(graph: Any, plan: Plan) -> Iterator[_Use]:
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in _ITEMSIZE}
    made_by = {node.output[0]: node for node in graph.node if node.op_type in ("Transpose", "Identity")}
    for node in nodes_of(graph):
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD or plan.keeps(node):
            continue
        for operand in range(2):
            name, between = node.input[operand], []
            while name in made_by:
                between.append(made_by[name])
                name = made_by[name].input[0]
            if name in tensors and tensors[name].dims:
                yield _Use(node, operand, tensors[name], _axis(node, operand, tensors[name], between), between)


def _axis(node: Any, operand: int, tensor: Any, between: Sequence[Any]) -> int:
    """Returns the dim of a weight that the node sums over."""
    rank = len(tensor.dims)
    last = operand == 0
    if node.op_type == "Gemm":
        last ^= bool(next((a.i for a in node.attribute if a.name == ("transA", "transB")[operand]), 0))
    axis = rank - 1 if last or rank == 1 else rank - 2
    for step in between:
        if step.op_type == "Transpose":
            perm = next((list(a.ints) for a in step.attribute if a.name == "perm"), list(range(rank))[::-1])
            axis = perm[axis]
    return int(axis)


def _add(graph: Any, use: _Use, name: str, weight: Weight | None, weights: list[Weight]) -> None:
    tensor = graph.initializer.add()
    tensor.CopyFrom(_copy(use.tensor, name=name))
    if weight is not None:
        weights.append(replace(weight, name=name, chunks=_stream(weight, tuple(tensor.dims), use.axis)))
        return
    found = microscaling.mxfp6(numpy_helper.to_array(tensor).astype(np.float32), use.axis)
    for field in ("float_data", "int32_data"):
        tensor.ClearField(field)
    tensor.raw_data = _packed(found, tensor.data_type)


def _stream(weight: Weight, dims: tuple[int, ...], axis: int) -> Any:
    """Returns how to read a weight piece by piece with whole blocks in each."""
    inner, itemsize = math.prod(dims[axis + 1 :]), _ITEMSIZE[weight.data_type]
    slab = dims[axis] * inner

    def chunks() -> Iterator[bytes]:
        most = max(CHUNK // itemsize, 1)
        for data in _pieces(weight.chunks(), [count * itemsize for count in _counts(weight, slab, inner, most)]):
            values = _unpacked(data, weight.data_type)
            rows = min(values.size, slab) // inner
            yield _packed(microscaling.mxfp6(values.reshape(-1, rows, inner), 1), weight.data_type)

    return chunks


def _counts(weight: Weight, slab: int, inner: int, most: int) -> Iterator[int]:
    """Yields how many elements belong to each piece: several slabs, or blocks of one."""
    left = weight.nbytes // _ITEMSIZE[weight.data_type]
    whole = slab * (most // slab) or inner * microscaling.BLOCK * max(1, most // (inner * microscaling.BLOCK))
    while left:
        rest = left if whole >= slab else (left - 1) % slab + 1  # of this slab
        yield (count := min(whole, rest))
        left -= count


def _pieces(chunks: Iterator[bytes], sizes: Sequence[int]) -> Iterator[bytes]:
    held = bytearray()
    for size in sizes:
        while len(held) < size:
            held += next(chunks)
        yield bytes(held[:size])
        del held[:size]


def _unpacked(data: bytes, kind: int) -> microscaling.Floats:
    if kind == _BFLOAT16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if kind == _FLOAT16 else np.float32).astype(np.float32)


def _packed(values: microscaling.Floats, kind: int) -> bytes:
    if kind == _BFLOAT16:  # an element has four significant bits, so nothing is cut off
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if kind == _FLOAT16 else np.float32).tobytes()


def _drop_unread(graph: Any, weights: list[Weight], uses: Sequence[_Use]) -> None:
    """Removes the originals that nobody reads any more, and the nodes between."""
    between = {node.output[0] for use in uses for node in use.between}
    readers = Counter(name for node in nodes_of(graph) for name in node.input)
    readers.update(info.name for info in graph.output)
    for node in reversed(list(graph.node)):
        if node.output[0] in between and not readers[node.output[0]]:
            graph.node.remove(node)
            readers.subtract(node.input)
    gone = {use.tensor.name for use in uses if not readers[use.tensor.name]}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in gone]:
        graph.initializer.remove(tensor)
    weights[:] = [weight for weight in weights if weight.name not in gone]
