# SPDX-License-Identifier: Apache-2.0
"""Refuses QPCs whose parts do not fit together: the crcs only show that a file is as it was written, by whomever."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .device import NSP_TOTAL

_PLACE = ("offset", "size", "crc32")
_MOST_BYTES = 2**32
"""A binding holds fewer: its size is a field of 32 bits."""


def header_problem(header: Mapping[str, Any], segments: tuple[str, ...], size: int) -> str:
    """Returns what is wrong with a header, or an empty text.

    Args:
        header: As read from JSON.
        segments: Names of the segments that must be there.
        size: Of the whole file in bytes.
    """
    return next(_header_problems(header, segments, size), "")


def _header_problems(header: Mapping[str, Any], segments: tuple[str, ...], size: int) -> Iterator[str]:
    if header.get("simulated") is not True:
        yield "it does not say that it is simulated"
    if not _is_count(header.get("num_cores"), most=NSP_TOTAL):
        yield f"num_cores is {_shown(header.get('num_cores'))}, a card has 1 to {NSP_TOTAL}"
    if not _is_count(header.get("num_devices"), most=2**16):
        yield f"num_devices is {_shown(header.get('num_devices'))}"
    for name in ("hw_version", "precision", "sdk_version"):
        if not isinstance(header.get(name), str):
            yield f"{name} is {_shown(header.get(name))}"
    retained, compressed = header.get("retained", {}), header.get("mxint8", [])
    if not isinstance(retained, dict) or not all(isinstance(name, str) for name in retained.values()):
        yield f"retained is {_shown(retained)}"
    if not isinstance(compressed, list) or not all(isinstance(name, str) for name in compressed):
        yield f"mxint8 is {_shown(compressed)}"
    places = header.get("segments")
    if not isinstance(places, dict):
        yield f"segments is {_shown(places)}"
        return
    for name in segments:
        entry = places.get(name)
        numbers: list[Any] = [entry.get(key) for key in _PLACE] if isinstance(entry, dict) else []
        if len(numbers) != 3 or not all(_is_count(number, least=0, most=2**63) for number in numbers):
            yield f"segment {name} is {_shown(entry)}"
        elif numbers[0] + numbers[1] > size:
            yield f"segment {name} ends at {numbers[0] + numbers[1]}, the file at {size}"


def description_problem(desc: Any, header: Mapping[str, Any], dtypes: Mapping[int, np.dtype[Any]]) -> str:
    """Returns what is wrong with an IoDesc, or between it and its header, or an empty text."""
    return next(_description_problems(desc, header, dtypes), "")


def _description_problems(desc: Any, header: Mapping[str, Any], dtypes: Mapping[int, np.dtype[Any]]) -> Iterator[str]:
    bindings = desc.selected_set.bindings
    names = [binding.name for binding in bindings]
    if not bindings or len(set(names)) != len(names) or "" in names:
        yield "its bindings have no name, or one twice"
    if [binding.index for binding in bindings] != list(range(len(bindings))):
        yield "its bindings are not numbered in order"
    for binding in bindings:
        if binding.type not in dtypes or binding.dir not in (0, 1):
            yield f"binding {binding.name!r} has type {binding.type} and direction {binding.dir}"
            continue
        size = _nbytes(binding.dims, dtypes[binding.type])
        if not 0 <= size < _MOST_BYTES or size != binding.size:
            yield f"binding {binding.name!r} {list(binding.dims)[:8]} has {size} bytes, its size says {binding.size}"
    yield from _shape_problems(desc, dtypes)
    yield from _state_problems(bindings, header)


def _shape_problems(desc: Any, dtypes: Mapping[int, np.dtype[Any]]) -> Iterator[str]:
    bindings = desc.selected_set.bindings
    for entry in desc.allowed_shapes:
        if len(entry.shapes) != len(bindings):
            yield f"a specialization has {len(entry.shapes)} shapes for {len(bindings)} bindings"
        for binding, shape in zip(bindings, entry.shapes, strict=False):
            if len(shape.dims) != len(binding.dims) or any(dim < 0 for dim in shape.dims):
                yield f"a specialization has {list(shape.dims)[:8]} for binding {binding.name!r}"
            elif binding.type in dtypes and _nbytes(shape.dims, dtypes[binding.type]) > binding.size:
                yield f"a specialization has {list(shape.dims)[:8]} for binding {binding.name!r}, beyond its size"


def _state_problems(bindings: Any, header: Mapping[str, Any]) -> Iterator[str]:
    by_name = {binding.name: binding for binding in bindings}
    for name, twin in header.get("retained", {}).items():
        if [by_name[end].dir for end in (name, twin) if end in by_name] != [0, 1]:
            yield f"{name!r} is retained as {twin!r}, which are no input and output"
    for name in header.get("mxint8", []):
        if name not in header.get("retained", {}):
            yield f"{name!r} is mxint8 and is not retained"


def network_problem(model: Any, file_name: str) -> str:
    """Returns what a network has that no compiled one has, or an empty text."""
    if model.functions:
        return "its network has functions"
    for tensor in model.graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        if places and places.get("location") != file_name:
            return f"weight {tensor.name!r} lies in {_shown(places.get('location'))}"
    return ""


def _nbytes(dims: Any, dtype: np.dtype[Any]) -> int:
    """Returns the size of a binding, or -1 for dims that are none."""
    return -1 if any(dim < 0 for dim in dims) else dtype.itemsize * math.prod(dim or 1 for dim in dims)


def _is_count(value: Any, *, least: int = 1, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
