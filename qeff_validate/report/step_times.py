# SPDX-License-Identifier: Apache-2.0
"""How long the steps of a run took last time."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from qeff_validate.errors import ValidateError
from qeff_validate.files import read_bytes
from qeff_validate.report.writers import write_texts

STEP_TIMES = "step-times.json"
"""The file in a store's directory."""

SHOWN_S = 0.5
"""Steps that take so long are told, and their durations kept."""

MOST_STEPS, MOST_BYTES = 1000, 1 << 20
"""Limits of the file with durations."""

NUMBER = re.compile(r"^\[\d+/\d+\] ")
"""Before the name of a step: which of how many results is being made."""


class StepTimes:
    """Durations of earlier runs by the name of a step, in a file; whatever is wrong with it, there are none.

    The number before a name, such as ``[2/9]``, does not belong to it.

    Args:
        path: a JSON file of seconds by name; None: nothing is remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def seconds(self, name: str) -> float | None:
        """Return how long a step took last time."""
        found = self._all().get(NUMBER.sub("", name))
        return found if isinstance(found, (int, float)) and math.isfinite(found) else None

    def estimate(self, name: str) -> str:
        """Return what is said of a step that begins: how long it took last time; empty if that is not known."""
        seconds = self.seconds(name)
        return f", {seconds:.0f} s last time" if seconds is not None and seconds >= 1 else ""

    def keep(self, name: str, seconds: float) -> None:
        """Remember how long a step took; of many steps the latest `MOST_STEPS`. No folder is made for it."""
        if self._path is None or not self._path.parent.is_dir():
            return
        name = NUMBER.sub("", name)
        times = self._all()
        times.pop(name, None)
        kept = {**dict([*times.items()][1 - MOST_STEPS :]), name: round(seconds, 2)}
        with suppress(OSError, ValidateError):  # a store that cannot be written is told where it matters
            write_texts(self._path.parent, {self._path.name: json.dumps(kept, indent=1)})

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(read_bytes(self._path, most_bytes=MOST_BYTES)) if self._path is not None else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}
