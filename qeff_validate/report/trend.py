# SPDX-License-Identifier: Apache-2.0
"""Values of the same metrics over several runs, in their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qeff_validate.report.baseline import Entry

BARS = "▁▂▃▄▅▆▇█"
"""From the least value to the greatest, by their logarithms."""

NOTHING, BROKEN = "·", "!"
"""Stand for a run without the value, and for one that is not finite."""


@dataclass(frozen=True, slots=True)
class Trend:
    """One quantity over several runs.

    Attributes:
        case: its name.
        runtime: its name, with ``(simulated)`` where it is.
        quantity: a metric, or a percentile of a workload in milliseconds.
        values: one a run; None: the run has none.
    """

    case: str
    runtime: str
    quantity: str
    values: tuple[float | None, ...]

    @property
    def growth(self) -> float | None:
        """The last value over the first one; None if one of them is missing, zero or not finite."""
        known = [value for value in self.values if value is not None]
        if len(known) < 2 or not (math.isfinite(known[-1]) and math.isfinite(known[0]) and known[0] > 0):
            return None
        return known[-1] / known[0]

    def bars(self) -> str:
        """Draw the values, a character a run.

        Examples:
            >>> Trend("a", "ort", "rel_l2", (1e-7, 1e-6, None, 1e-5)).bars()
            '▁▅·█'
        """
        logarithms = [math.log10(value) for value in self.values if value is not None and 0 < value < math.inf]
        low, high = min(logarithms, default=0.0), max(logarithms, default=0.0)

        def bar(value: float | None) -> str:
            if value is None:
                return NOTHING
            if not math.isfinite(value):
                return BROKEN
            if value <= 0 or high == low:
                return BARS[0]
            return BARS[round((math.log10(value) - low) / (high - low) * (len(BARS) - 1))]

        return "".join(map(bar, self.values))


def trends(runs: Sequence[Sequence[Entry]]) -> Iterator[Trend]:
    """Yield the trend of each quantity of each case and runtime, as they first appear.

    Args:
        runs: the entries of each run, the earliest first.
    """
    values = [
        {(entry.case, _runtime(entry), name): value for entry in run for name, value in _quantities(entry)}
        for run in runs
    ]
    for key in dict.fromkeys(key for run in values for key in run):
        yield Trend(*key, tuple(run.get(key) for run in values))


def _runtime(entry: Entry) -> str:
    return f"{entry.runtime} (simulated)" if entry.simulated else entry.runtime


def _quantities(entry: Entry) -> Iterator[tuple[str, float]]:
    for name, value in entry.metrics.items():
        yield name, float(value)
    for item in (entry.performance or {"workloads": []})["workloads"]:
        for key in ("p50_ms", "p99_ms"):
            if key in item["summary"]:
                yield f"{item['quantity']}, {item['name']}: {key}", float(item["summary"][key])
