# SPDX-License-Identifier: Apache-2.0
"""How long the steps of a run took last time."""

from __future__ import annotations

import re
from pathlib import Path

from qeff_validate.report.kept_numbers import KeptNumbers

STEP_TIMES = "step-times.json"
"""The file in a store's directory."""

SHOWN_S = 0.5
"""Steps that take so long are told, and their durations kept."""

NUMBER = re.compile(r"^\[\d+/\d+\] ")
"""Before the name of a step: which of how many results is being made."""


class StepTimes:
    """Durations of earlier runs by the name of a step.

    The number before a name, such as ``[2/9]``, does not belong to it.

    Args:
        path: of `KeptNumbers`, in seconds; None: nothing is remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self._kept = KeptNumbers(path)

    def seconds(self, name: str) -> float | None:
        """Return how long a step took last time."""
        return self._kept.all().get(NUMBER.sub("", name))

    def estimate(self, name: str) -> str:
        """Return what is said of a step that begins: how long it took last time; empty if that is not known."""
        seconds = self.seconds(name)
        return f", {seconds:.0f} s last time" if seconds is not None and seconds >= 1 else ""

    def keep(self, name: str, seconds: float) -> None:
        """Remember how long a step took."""
        self._kept.keep(NUMBER.sub("", name), seconds)
