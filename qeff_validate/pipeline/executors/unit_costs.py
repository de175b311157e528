# SPDX-License-Identifier: Apache-2.0
"""What units took in earlier runs, and what is expected of those that were never run."""

from __future__ import annotations

from pathlib import Path

from qeff_validate.config.case import Case
from qeff_validate.models.sources.resolve import weights_size
from qeff_validate.pipeline.executors.units import Unit
from qeff_validate.report.kept_numbers import KeptNumbers

MEMORY, SECONDS = "unit-memory.json", "unit-times.json"
"""In a store's directory."""

BASE_MB = 700.0
"""Memory of a process with torch and transformers loaded, in 10^6 bytes, rounded up: units of small random bodies took
421 to 493 (``unit-memory.json`` of a store)."""

COPIES = {"reference": 1.5, "measure": 3.5, "export": 3.0, "compile": 2.0, "run": 2.5}
"""Bytes that each stage takes for a byte of weights in the model's files, with room: MiniLM (91 MB) took at most 711 MB
in all. Files of quantized weights hold fewer bytes than a model takes (SmolLM2 in GGUF: 98 MB, and up to 2.2 GB in a
run), which only the next run knows."""


class UnitCosts:
    """Time and memory of units, as measured in runs before this one; memory else estimated from the weights.

    Args:
        store: directory of the store, which keeps the measured ones.
    """

    def __init__(self, store: Path) -> None:
        self._memory, self._times = KeptNumbers(store / MEMORY), KeptNumbers(store / SECONDS)
        self._known_mb, self._known_s = self._memory.all(), self._times.all()
        self._weights: dict[str, int] = {}

    def seconds(self, unit: Unit) -> float | None:
        """Return how long a unit took last time; None if it never ran."""
        return self._known_s.get(unit.id)

    def megabytes(self, unit: Unit, case: Case) -> float:
        """Return the most memory that a unit is expected to take, in 10^6 bytes.

        Args:
            unit: one of the case.
            case: whose source has weights.
        """
        if unit.id in self._known_mb:
            return self._known_mb[unit.id]
        if case.source not in self._weights:
            self._weights[case.source] = weights_size(case)
        return BASE_MB + COPIES[unit.stage] * self._weights[case.source] / 1e6

    def keep(self, unit: Unit, seconds: float, megabytes: float | None) -> None:
        """Remember what a unit took.

        Args:
            unit: has ended.
            seconds: its duration.
            megabytes: its greatest memory, in 10^6 bytes; None: the system does not tell.
        """
        self._times.keep(unit.id, seconds)
        if megabytes is not None:
            self._memory.keep(unit.id, megabytes)
