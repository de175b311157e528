# SPDX-License-Identifier: Apache-2.0
"""Slicing specs: which block of a retained state is transferred (card-contract §4.8)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..graph import Dims


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """The start of the block for bindings whose name matches.

    Attributes:
        name: pattern of the whole name.
        itemsize: bytes per element.
        starts: per dim a number, or the name of a parameter.
    """

    name: re.Pattern[str]
    itemsize: int
    starts: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class SlicingSpec:
    """The handle that `Program.createSlicingSpecHandle` returns."""

    buffers: tuple[BufferSpec, ...]

    @classmethod
    def parse(cls, text: str) -> SlicingSpec:
        """Parse `{"BufferSpecs": [{"Name", "ElemSize", "DimSpecs": [{"start"}, …]}, …]}`.

        Raises:
            ValueError: the text is not of this form.
        """
        try:
            return cls(tuple(_buffer_spec(entry) for entry in json.loads(text)["BufferSpecs"]))
        except (KeyError, TypeError, re.error) as error:
            raise ValueError(f"not a slicing spec: {error!r}") from error

    def start(self, name: str, itemsize: int, rank: int, parameters: Mapping[str, int]) -> Dims | None:
        """Return the start of a binding's block; None if no spec matches its name.

        Raises:
            ValueError: the spec does not fit the binding, or a parameter is missing.
        """
        spec = next((spec for spec in self.buffers if spec.name.fullmatch(name)), None)
        if spec is None:
            return None
        if (spec.itemsize, len(spec.starts)) != (itemsize, rank):
            raise ValueError(f"the slicing spec of {name} has {len(spec.starts)} dims of {spec.itemsize} bytes")
        starts = tuple(parameters.get(start, -1) if isinstance(start, str) else start for start in spec.starts)
        if min(starts, default=0) < 0:
            raise ValueError(f"the slice of {name} starts at {spec.starts}, with {dict(parameters)}")
        return starts


def _buffer_spec(entry: Any) -> BufferSpec:
    starts = tuple(dim["start"] for dim in entry["DimSpecs"])
    if not all(isinstance(start, str | int) for start in starts):
        raise TypeError(f"start is a number or a parameter, not {starts}")
    return BufferSpec(re.compile(entry["Name"]), int(entry["ElemSize"]), starts)
