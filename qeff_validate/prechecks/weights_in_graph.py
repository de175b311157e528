# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model stand in an ONNX file, bit for bit; neither a framework nor the whole model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.models.adapters.files import DTYPES
from qeff_validate.models.sources.embedding_tables import header

TRIED = 16
"""So many weights are looked for, the largest."""

LEAST = 1024
"""Elements of a weight that is no coincidence."""

UNUSED = "pooler"
"""A part of a body that pooled models leave out of their graphs."""

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Found:
    """What came of looking for a model's weights.

    Attributes:
        tried: how many were looked for.
        same: how many are there, as they are or transposed.
        alike: how many are not, though tensors of their shape are.
    """

    tried: int
    same: int
    alike: int


def found_in(onnx: Path, files: Sequence[Path]) -> Found:
    """Look for the matrices of safetensors files among the float32 initializers of an ONNX file.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    stored = _initializers(onnx)
    same = alike = tried = 0
    for weight in _largest(files):
        tried += 1
        candidates = [*stored.get(weight.shape, ()), *(other.T for other in stored.get(weight.shape[::-1], ()))]
        # most are told apart by their first row
        if any(np.array_equal(weight[0], other[0]) and np.array_equal(weight, other) for other in candidates):
            same += 1
        elif candidates:
            alike += 1
    return Found(tried, same, alike)


def _largest(files: Sequence[Path]) -> Iterator[Any]:
    places = []
    for file in files:
        entries, start = header(file)
        for name, entry in sorted(entries.items()):
            if UNUSED in name.split("."):
                continue
            if len(entry["shape"]) == 2 and entry["dtype"] in FLOATS and np.prod(entry["shape"]) >= LEAST:
                places.append((int(np.prod(entry["shape"])), name, file, start, entry))
    for _, _, file, start, entry in sorted(places, key=lambda place: (-place[0], place[1]))[:TRIED]:
        at = start + entry["data_offsets"][0]
        array: Any = np.memmap(file, DTYPES[entry["dtype"]], "r", at, tuple(entry["shape"]))
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        array = np.asarray(array, dtype=np.float32)
        if not (array == array.flat[0]).all():
            yield array


def _initializers(path: Path) -> dict[tuple[int, ...], list[Any]]:
    """Return float32 matrices by shape, without a copy."""
    import onnx

    found: dict[tuple[int, ...], list[Any]] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        shape = tuple(tensor.dims)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            place = path.parent / said["location"]
            array: Any = np.memmap(place, "<f4", "r", int(said.get("offset", 0)), shape)
        else:
            array = onnx.numpy_helper.to_array(tensor)
        found.setdefault(shape, []).append(array)
    return found
