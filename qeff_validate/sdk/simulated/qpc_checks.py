# SPDX-License-Identifier: Apache-2.0
"""Consistency checks of QPC files: the CRCs detect damage, but not a forged file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .device import NSP_TOTAL

_LOCATION = ("offset", "size", "crc32")
_MAX_BYTES = 2**32
"""A binding must be smaller: its size is a field of 32 bits."""


def header_problem(header: Mapping[str, Any], segments: tuple[str, ...], size: int) -> str:
    """Return the first problem of a header; empty if there is none.

    Args:
        header: decoded from JSON.
        segments: names of the required segments.
        size: of the whole file in bytes.
    """
    return next(_header_problems(header, segments, size), "")


def _header_problems(header: Mapping[str, Any], segments: tuple[str, ...], size: int) -> Iterator[str]:
    if header.get("simulated") is not True:
        yield "it does not say that it is simulated"
    if not _is_count(header.get("num_cores"), maximum=NSP_TOTAL):
        yield f"num_cores is {_shown(header.get('num_cores'))}, a card has 1 to {NSP_TOTAL}"
    if not _is_count(header.get("num_devices"), maximum=2**16):
        yield f"num_devices is {_shown(header.get('num_devices'))}"
    for name in ("hw_version", "precision", "sdk_version"):
        if not isinstance(header.get(name), str):
            yield f"{name} is {_shown(header.get(name))}"
    retained = header.get("retained", {})
    if not isinstance(retained, dict) or not all(isinstance(name, str) for name in retained.values()):
        yield f"retained is {_shown(retained)}"
    for key in ("in_place", "mxint8"):
        names = header.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            yield f"{key} is {_shown(names)}"
    locations = header.get("segments")
    if not isinstance(locations, dict):
        yield f"segments is {_shown(locations)}"
        return
    for name in segments:
        entry = locations.get(name)
        numbers: list[Any] = [entry.get(key) for key in _LOCATION] if isinstance(entry, dict) else []
        if len(numbers) != 3 or not all(_is_count(number, minimum=0, maximum=2**63) for number in numbers):
            yield f"segment {name} is {_shown(entry)}"
        elif numbers[0] + numbers[1] > size:
            yield f"segment {name} ends at {numbers[0] + numbers[1]}, the file at {size}"


def description_problem(desc: Any, header: Mapping[str, Any], dtypes: Mapping[int, np.dtype[Any]]) -> str:
    """Return the first problem of an IoDesc, alone or together with its header; empty if there is none.

    Args:
        desc: IoDesc (card-contract §3).
        header: decoded from JSON.
        dtypes: dtype of each supported binding type.
    """
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
        if not 0 <= size < _MAX_BYTES or size != binding.size:
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
    for key in ("in_place", "mxint8"):
        for name in header.get(key, []):
            if name not in header.get("retained", {}):
                yield f"{name!r} is {key} and is not retained"


def network_problem(model: Any, file_name: str) -> str:
    """Return the first problem of a network; empty if there is none.

    Args:
        model: ModelProto.
        file_name: the only location of external data.
    """
    if model.functions:
        return "its network has functions"
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external and external.get("location") != file_name:
            return f"weight {tensor.name!r} lies in {_shown(external.get('location'))}"
    return ""


def _nbytes(dims: Any, dtype: np.dtype[Any]) -> int:
    """Return the size of a binding in bytes, or -1 for negative dims."""
    return -1 if any(dim < 0 for dim in dims) else dtype.itemsize * math.prod(dim or 1 for dim in dims)


def _is_count(value: Any, *, minimum: int = 1, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
