# SPDX-License-Identifier: Apache-2.0
"""The custom IO list: the precision of single inputs and outputs (card-contract §6.3)."""

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
class Wanted:
    """What an entry asks for; an int8 q stands for scale · (q − offset)."""

    precision: str
    scale: float = 1.0
    offset: int = 0


def read(path: Path) -> tuple[dict[str, Wanted], list[str]]:
    """Returns what each named IO is to be, and warnings.

    Raises:
        CompileError: Missing, not such a list, a name twice, a layout, which is not simulated, or a bad scale.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: custom IO list is missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompileError(f"{path} is not a list of IOName and Precision: {error}") from error
    if not isinstance(entries, list):
        raise CompileError(f"{path} is not a list of IOName and Precision, but {type(entries).__name__}")
    found: dict[str, Wanted] = {}
    warnings = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"IOName", "Precision"} <= set(entry):
            raise CompileError(f"{path} is not a list of IOName and Precision: {entry!r}")
        name = str(entry["IOName"])
        if name in found:
            raise CompileError(f"{path}: '{name}' is there twice")
        if unknown := sorted(str(key) for key in set(entry) - _KEYS):
            warnings.append(f"custom IO: {', '.join(unknown)} of '{name}' is not known and ignored")
        found[name] = _wanted(name, entry)
    return found, warnings


def _wanted(name: str, entry: Mapping[Any, Any]) -> Wanted:
    # The model's own layout is what NCHW stands for, so it asks for nothing.
    if entry.get("Layout", "NCHW") != "NCHW":
        raise CompileError(f"Custom IO: Layout {entry['Layout']} of '{name}' is not simulated; leave it out")
    precision, scale, offset = str(entry["Precision"]), entry.get("Scale", 1.0), entry.get("Offset", 0)
    if precision != "int8" and (scale, offset) != (1, 0):
        raise CompileError(f"Custom IO: Scale and Offset of '{name}' are for int8, and its precision is {precision}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
        raise CompileError(f"Custom IO: Scale of '{name}' is a positive number, not {scale!r}")
    if isinstance(offset, bool) or not isinstance(offset, int) or not -128 <= offset <= 127:
        raise CompileError(f"Custom IO: Offset of '{name}' is a whole number from -128 to 127, not {offset!r}")
    return Wanted(precision, float(scale), offset)


def write_template(path: Path, types: Mapping[str, str]) -> None:
    """Writes a list that changes nothing: every float input and output with the precision that it has."""
    entries = [{"IOName": name, "Precision": kind} for name, kind in types.items()]
    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
