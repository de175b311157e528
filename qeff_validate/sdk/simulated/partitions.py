# SPDX-License-Identifier: Apache-2.0
"""Several devices: of the partition file, the simulator uses how many there are, and how many cores of each (§6.5)."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import CompileError


def read(path: Path) -> tuple[int, int]:
    """Returns the number of devices and the most cores that one of them needs.

    Raises:
        CompileError: The file is missing, or not of the form of qaic-contract §6.5.
    """
    try:
        partitions = json.loads(path.read_text(encoding="utf-8"))["partitions"]
        cores = {int(entry["deviceId"]): int(entry["numCores"]) for part in partitions for entry in part["devices"]}
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: partition config is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CompileError(f"{path} has no partitions of devices with deviceId and numCores: {error!r}") from error
    if not cores or min(cores.values()) < 1:
        raise CompileError(f"{path} names no device, or one without cores")
    return len(cores), max(cores.values())
