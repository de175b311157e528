# SPDX-License-Identifier: Apache-2.0
"""Detaches the weights of an ONNX model: the compiler rewrites a small graph, and weights are streamed.

A weight is read in chunks, from the model's own bytes or from its external data file, at the moment when it is written.
The model keeps a stub: name, type and dims, marked as external data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from onnx import helper, numpy_helper

from .errors import CompileError
from .graph import nodes_of, subgraphs

SMALL = 1024
"""Tensors up to this size in bytes stay in the graph, where shape inference can read them; shapes are tiny."""
CHUNK = 16 * 2**20
_FOUR_BITS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@dataclass(frozen=True, slots=True)
class Weight:
    """One initializer whose bytes are read on demand.

    Attributes:
        name: of the initializer.
        data_type: ONNX element type.
        nbytes: size in bytes.
        chunks: returns an iterator over the raw data.
    """

    name: str
    data_type: int
    nbytes: int
    chunks: Callable[[], Iterator[bytes]]


def size_in_bytes(tensor: Any) -> int:
    """Return the size of a tensor's raw data in bytes, from its type and dims.

    Raises:
        CompileError: the type is unknown.
    """
    count = int(math.prod(tensor.dims))
    if tensor.data_type in _FOUR_BITS:
        return (count + 1) // 2
    try:
        return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:
        raise CompileError(f"Initializer '{tensor.name}' has unknown type {tensor.data_type}") from None


def detach(model: Any, folder: Path) -> list[Weight]:
    """Replace every large initializer of the main graph by a stub, and return the weights.

    Other tensors (in nodes, subgraphs and functions) are rarely large; their external data is loaded.

    Args:
        model: ModelProto, loaded without its external data; changed in place.
        folder: the directory that external data locations are relative to.

    Raises:
        CompileError: a type is not supported, or data is missing or has another size.
    """
    tensors = list(model.graph.initializer)
    # Removed messages exist as long as they are referenced, so embedded data is not copied here.
    del model.graph.initializer[:]
    weights = []
    for tensor in tensors:
        weight = _weight(tensor, folder)
        stub = model.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        if weight.nbytes <= SMALL:
            stub.raw_data = b"".join(weight.chunks())
        else:
            stub.data_location = onnx.TensorProto.EXTERNAL
            weights.append(weight)
    for part in (model.graph, *model.functions):
        for tensor in _inner_tensors(part):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.raw_data = b"".join(_weight(tensor, folder).chunks())
                del tensor.external_data[:]
                tensor.data_location = onnx.TensorProto.DEFAULT
    return weights


def _inner_tensors(part: Any) -> Iterator[Any]:
    for node in nodes_of(part):
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
        for inner in subgraphs(node):
            yield from inner.initializer


def _weight(tensor: Any, folder: Path) -> Weight:
    if tensor.data_type == onnx.TensorProto.STRING:
        raise CompileError(f"Initializer '{tensor.name}' is of type string, which the card does not support")
    nbytes = size_in_bytes(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, nbytes, folder)
    actual = len(_embedded(tensor))
    if actual != nbytes:
        raise CompileError(
            f"QAIC_ERROR: Error message: initializer '{tensor.name}' has {actual} bytes of data, but "
            f"its type and dims {list(tensor.dims)} need {nbytes}; the model is damaged"
        )
    return Weight(tensor.name, tensor.data_type, nbytes, lambda: _slices(_embedded(tensor)))


def _embedded(tensor: Any) -> bytes:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    if tensor.data_type in _FOUR_BITS:
        return bytes(b & 0xFF for b in tensor.int32_data)
    try:
        return numpy_helper.to_array(tensor).tobytes()
    except ValueError:
        return b""


def _slices(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def _external(tensor: Any, nbytes: int, folder: Path) -> Weight:
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    relative = PurePosixPath(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise CompileError(
            f"External data location '{location}' of initializer '{tensor.name}' leaves the "
            "model's folder; save the data beside the model"
        )
    path = folder / relative
    if not path.is_file():
        raise CompileError(
            f"Failed to open file{path}: external data of initializer '{tensor.name}' is missing; copy "
            f"{location} along with the model"
        )
    try:
        offset, length = int(info.get("offset") or 0), int(info.get("length") or nbytes)
    except ValueError:
        offset, length = -1, 0
    if offset < 0 or length != nbytes or path.stat().st_size < offset + length:
        raise CompileError(
            f"External data of initializer '{tensor.name}' does not fit: {nbytes} bytes are needed at offset "
            f"{offset}, but {path} has {path.stat().st_size} bytes and the model says {length}"
        )
    return Weight(tensor.name, tensor.data_type, nbytes, lambda: _file_chunks(path, offset, nbytes))


def _file_chunks(path: Path, offset: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while length:
            chunk = file.read(min(CHUNK, length))
            if not chunk:
                raise CompileError(f"{path} became shorter while it was read")
            length -= len(chunk)
            yield chunk
