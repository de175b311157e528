# SPDX-License-Identifier: Apache-2.0
"""Numbers that runs leave for those after them, by name, in a file."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

from qeff_validate.errors import ValidateError
from qeff_validate.files import read_bytes
from qeff_validate.report.writers import write_texts

MOST_NUMBERS, MOST_BYTES = 1000, 1 << 20
"""Limits of the file."""


class KeptNumbers:
    """Finite numbers by name in a JSON file; whatever is wrong with it, there are none.

    Args:
        path: of the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def all(self) -> dict[str, float]:
        """Return what the file holds."""
        try:
            found = json.loads(read_bytes(self._path, most_bytes=MOST_BYTES)) if self._path is not None else {}
        except (OSError, ValueError, RecursionError):
            return {}
        pairs = found.items() if isinstance(found, dict) else ()
        return {name: value for name, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)}

    def keep(self, name: str, value: float) -> None:
        """Add a number; of many the latest `MOST_NUMBERS` stay. No folder is made for the file."""
        if self._path is None or not self._path.parent.is_dir():
            return
        numbers = self.all()
        numbers.pop(name, None)
        kept = {**dict([*numbers.items()][1 - MOST_NUMBERS :]), name: round(value, 2)}
        with suppress(OSError, ValidateError):  # a store that cannot be written is told where it matters
            write_texts(self._path.parent, {self._path.name: json.dumps(kept, indent=1)})
