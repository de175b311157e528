# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model are in an ONNX file, bit for bit; neither a framework nor the whole model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.models.adapters.files import DTYPES
from qeff_validate.models.sources.embedding_tables import header

SEARCHED = 16
"""How many weights are looked for: the largest."""

MIN_ELEMENTS = 1024
"""A matrix with as many elements is not equal to another one by coincidence."""

UNUSED = "pooler"
"""A module of a body that pooled models do not run, so that exporters drop its weights."""

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class WeightMatches:
    """How many of a model's weights are in a graph.

    Attributes:
        searched: how many were looked for.
        identical: how many are in the graph, as they are or transposed.
        same_shape: how many are not, though the graph has weights of their shape.
    """

    searched: int
    identical: int
    same_shape: int


def find_weights(onnx: Path, files: Sequence[Path]) -> WeightMatches:
    """Look for the matrices of safetensors files among the float32 initializers of an ONNX file.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    initializers = _initializers(onnx)
    searched = identical = same_shape = 0
    for weight in _largest(files):
        searched += 1
        candidates = [
            *initializers.get(weight.shape, ()),
            *(other.T for other in initializers.get(weight.shape[::-1], ())),
        ]
        # the first row tells most of them apart
        if any(np.array_equal(weight[0], other[0]) and np.array_equal(weight, other) for other in candidates):
            identical += 1
        elif candidates:
            same_shape += 1
    return WeightMatches(searched, identical, same_shape)


def _largest(files: Sequence[Path]) -> Iterator[Any]:
    """Yield the largest matrices of safetensors files as float32 ``[rows, columns]``; constant ones are left out."""
    matrices = []
    for file in files:
        entries, start = header(file)
        for name, entry in sorted(entries.items()):
            if UNUSED in name.split("."):
                continue
            if len(entry["shape"]) == 2 and entry["dtype"] in FLOATS and np.prod(entry["shape"]) >= MIN_ELEMENTS:
                matrices.append((int(np.prod(entry["shape"])), name, file, start, entry))
    for _, _, file, start, entry in sorted(matrices, key=lambda matrix: (-matrix[0], matrix[1]))[:SEARCHED]:
        at = start + entry["data_offsets"][0]
        array: Any = np.memmap(file, DTYPES[entry["dtype"]], "r", at, tuple(entry["shape"]))
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        array = np.asarray(array, dtype=np.float32)
        if not (array == array.flat[0]).all():
            yield array


def _initializers(path: Path) -> dict[tuple[int, ...], list[Any]]:
    """Return the float32 matrices of an ONNX file by shape; external data is mapped, not copied."""
    import onnx

    matrices: dict[tuple[int, ...], list[Any]] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        shape = tuple(tensor.dims)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external = {entry.key: entry.value for entry in tensor.external_data}
            data_file = path.parent / external["location"]
            array: Any = np.memmap(data_file, "<f4", "r", int(external.get("offset", 0)), shape)
        else:
            array = onnx.numpy_helper.to_array(tensor)
        matrices.setdefault(shape, []).append(array)
    return matrices
