# SPDX-License-Identifier: Apache-2.0
"""The custom IO list: the precision of single inputs and outputs (qaic-contract §6.3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import CompileError

_KEYS = {"IOName", "Precision", "Layout", "Scale", "Offset"}


def read(path: Path) -> tuple[dict[str, str], list[str]]:
    """Returns IO name to precision, and warnings.

    Raises:
        CompileError: Missing, not such a list, a name twice, or a layout or scale, which are not simulated.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: custom IO list is missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompileError(f"{path} is not a list of IOName and Precision: {error}") from error
    if not isinstance(entries, list):
        raise CompileError(f"{path} is not a list of IOName and Precision, but {type(entries).__name__}")
    found: dict[str, str] = {}
    warnings = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"IOName", "Precision"} <= set(entry):
            raise CompileError(f"{path} is not a list of IOName and Precision: {entry!r}")
        name = str(entry["IOName"])
        if name in found:
            raise CompileError(f"{path}: '{name}' is there twice")
        _refuse_conversion(name, entry)
        if unknown := sorted(str(key) for key in set(entry) - _KEYS):
            warnings.append(f"custom IO: {', '.join(unknown)} of '{name}' is not known and ignored")
        found[name] = str(entry["Precision"])
    return found, warnings


def _refuse_conversion(name: str, entry: Mapping[Any, Any]) -> None:
    # The model's own layout is what NCHW stands for, so it asks for nothing.
    if entry.get("Layout", "NCHW") != "NCHW":
        raise CompileError(f"Custom IO: Layout {entry['Layout']} of '{name}' is not simulated; leave it out")
    if entry.get("Scale", 1) != 1 or entry.get("Offset", 0) != 0:
        raise CompileError(f"Custom IO: Scale and Offset of '{name}' are for int8, which is not simulated")


def write_template(path: Path, types: Mapping[str, str]) -> None:
    """Writes a list that changes nothing: every float input and output with the precision that it has."""
    entries = [{"IOName": name, "Precision": kind} for name, kind in types.items()]
    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
