# SPDX-License-Identifier: Apache-2.0
"""`-mxfp6-matmul`: the constant weights of MatMul and Gemm are rounded to MXFP6 (card-contract §7).

A weight is an initializer that a MatMul or Gemm reads, directly or through Transpose and Identity; blocks lie along the
dim that is summed over. Other readers (a tied embedding, a node that is listed as float32) read the original, so the
weight is then stored twice. The QPC contains the decompressed values, in the type of the model.
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
    """A weight as an operand.

    Attributes:
        node: the MatMul or Gemm.
        operand: index of its input.
        tensor: the initializer.
        axis: the dim of the tensor that is summed over.
        between: the Transpose and Identity nodes between, starting at the operand.
    """

    node: Any
    operand: int
    tensor: Any
    axis: int
    between: Sequence[Any]


def compress(graph: Any, weights: list[Weight], plan: Plan) -> int:
    """Compress the weights in place, and return their number.

    Args:
        graph: GraphProto on which shape inference has run.
        weights: the streamed weights; changed in place.
        plan: listed nodes in float32 keep the original weights.
    """
    streamed = {weight.name: weight for weight in weights}
    infos = {info.name: info for info in graph.value_info}
    uses = list(_uses(graph, plan))
    created: set[str] = set()
    between: list[Any] = []
    for use in uses:
        end = f"/sim.mxfp6.{use.axis}"
        name = use.tensor.name + end
        if name not in created:
            _add(graph, use, name, streamed.get(use.tensor.name), weights)
        for node in reversed(use.between):
            created.add(name)
            before, name = name, node.output[0] + end
            if name not in created:
                between.append(_copy(node, output=[name], input=[before]))
                graph.value_info.extend(_copy(infos[n], name=name) for n in node.output if n in infos)
        created.add(name)
        use.node.input[use.operand] = name
    nodes = [*between, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _remove_unread(graph, weights, uses)
    return len({use.tensor.name for use in uses})


def _copy(message: Any, **fields: Any) -> Any:
    """Return a copy of a protobuf message with some fields replaced."""
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
    producers = {node.output[0]: node for node in graph.node if node.op_type in ("Transpose", "Identity")}
    for node in nodes_of(graph):
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD or plan.is_listed_float32(node):
            continue
        for operand in range(2):
            name, between = node.input[operand], []
            while name in producers:
                between.append(producers[name])
                name = producers[name].input[0]
            if name in tensors and tensors[name].dims:
                yield _Use(node, operand, tensors[name], _axis(node, operand, tensors[name], between), between)


def _axis(node: Any, operand: int, tensor: Any, between: Sequence[Any]) -> int:
    """Return the dim of a weight tensor that the node sums over."""
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
    values = microscaling.mxfp6(numpy_helper.to_array(tensor).astype(np.float32), use.axis)
    for field in ("float_data", "int32_data"):
        tensor.ClearField(field)
    tensor.raw_data = _packed(values, tensor.data_type)


def _stream(weight: Weight, dims: tuple[int, ...], axis: int) -> Any:
    """Return a function that reads a compressed weight in pieces of whole blocks."""
    inner, itemsize = math.prod(dims[axis + 1 :]), _ITEMSIZE[weight.data_type]
    slab = dims[axis] * inner

    def chunks() -> Iterator[bytes]:
        limit = max(CHUNK // itemsize, 1)
        for data in _pieces(weight.chunks(), [count * itemsize for count in _counts(weight, slab, inner, limit)]):
            values = _unpacked(data, weight.data_type)
            rows = min(values.size, slab) // inner
            yield _packed(microscaling.mxfp6(values.reshape(-1, rows, inner), 1), weight.data_type)

    return chunks


def _counts(weight: Weight, slab: int, inner: int, limit: int) -> Iterator[int]:
    """Yield the number of elements of each piece: several slabs, or blocks of one slab.

    Args:
        weight: the weight.
        slab: elements of all blocks with the same outer indices.
        inner: elements behind the axis of the blocks.
        limit: the most elements of a piece, where a block fits into it.
    """
    remaining = weight.nbytes // _ITEMSIZE[weight.data_type]
    size = slab * (limit // slab) or inner * microscaling.BLOCK * max(1, limit // (inner * microscaling.BLOCK))
    while remaining:
        in_slab = remaining if size >= slab else (remaining - 1) % slab + 1
        yield (count := min(size, in_slab))
        remaining -= count


def _pieces(chunks: Iterator[bytes], sizes: Sequence[int]) -> Iterator[bytes]:
    """Yield the same bytes in pieces of the given sizes."""
    buffer = bytearray()
    for size in sizes:
        while len(buffer) < size:
            buffer += next(chunks)
        yield bytes(buffer[:size])
        del buffer[:size]


def _unpacked(data: bytes, kind: int) -> microscaling.Floats:
    if kind == _BFLOAT16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if kind == _FLOAT16 else np.float32).astype(np.float32)


def _packed(values: microscaling.Floats, kind: int) -> bytes:
    if kind == _BFLOAT16:  # an element has four significant bits, so truncation is exact
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if kind == _FLOAT16 else np.float32).tobytes()


def _remove_unread(graph: Any, weights: list[Weight], uses: Sequence[_Use]) -> None:
    """Remove the original weights without readers, and the nodes between."""
    between = {node.output[0] for use in uses for node in use.between}
    readers = Counter(name for node in nodes_of(graph) for name in node.input)
    readers.update(info.name for info in graph.output)
    for node in reversed(list(graph.node)):
        if node.output[0] in between and not readers[node.output[0]]:
            graph.node.remove(node)
            readers.subtract(node.input)
    removed = {use.tensor.name for use in uses if not readers[use.tensor.name]}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in removed]:
        graph.initializer.remove(tensor)
    weights[:] = [weight for weight in weights if weight.name not in removed]
