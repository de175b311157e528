# SPDX-License-Identifier: Apache-2.0
"""The custom IO list: the precision of individual inputs and outputs (card-contract §6.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CompileError

_KEYS = {"IOName", "Precision", "Layout", "Scale", "Offset"}


@dataclass(frozen=True, slots=True)
class PortFormat:
    """The requested format of an input or output.

    Attributes:
        precision: ``float``, ``float16``, ``bfloat16``, ``int8`` or ``mxint8``.
        scale: an int8 value q stands for scale · (q − offset).
        offset: see scale.
    """

    precision: str
    scale: float = 1.0
    offset: int = 0


def read(path: Path) -> tuple[dict[str, PortFormat], list[str]]:
    """Read a custom IO list.

    Returns:
        The format of each listed input or output by name, and warnings.

    Raises:
        CompileError: the file is missing or no such list, a name is listed twice, a layout is not NCHW, or a scale or
            offset is invalid.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: custom IO list is missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompileError(f"{path} is not a list of IOName and Precision: {error}") from error
    if not isinstance(entries, list):
        raise CompileError(f"{path} is not a list of IOName and Precision, but {type(entries).__name__}")
    formats: dict[str, PortFormat] = {}
    warnings = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"IOName", "Precision"} <= set(entry):
            raise CompileError(f"{path} is not a list of IOName and Precision: {entry!r}")
        name = str(entry["IOName"])
        if name in formats:
            raise CompileError(f"{path}: '{name}' is there twice")
        if unknown := sorted(str(key) for key in set(entry) - _KEYS):
            warnings.append(f"custom IO: {', '.join(unknown)} of '{name}' is not known and ignored")
        formats[name] = _port_format(name, entry)
    return formats, warnings


def _port_format(name: str, entry: Mapping[Any, Any]) -> PortFormat:
    # NCHW stands for the model's own layout, so it changes nothing.
    if entry.get("Layout", "NCHW") != "NCHW":
        raise CompileError(f"Custom IO: Layout {entry['Layout']} of '{name}' is not simulated; leave it out")
    precision, scale, offset = str(entry["Precision"]), entry.get("Scale", 1.0), entry.get("Offset", 0)
    if precision != "int8" and (scale, offset) != (1, 0):
        raise CompileError(f"Custom IO: Scale and Offset of '{name}' are for int8, and its precision is {precision}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
        raise CompileError(f"Custom IO: Scale of '{name}' is a positive number, not {scale!r}")
    if isinstance(offset, bool) or not isinstance(offset, int) or not -128 <= offset <= 127:
        raise CompileError(f"Custom IO: Offset of '{name}' is a whole number from -128 to 127, not {offset!r}")
    return PortFormat(precision, float(scale), offset)


def write_template(path: Path, types: Mapping[str, str]) -> None:
    """Write a list that changes nothing.

    Args:
        path: of the YAML file.
        types: the present precision of every float input and output by name.
    """
    entries = [{"IOName": name, "Precision": kind} for name, kind in types.items()]
    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
