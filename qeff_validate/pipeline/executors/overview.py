# SPDX-License-Identifier: Apache-2.0
"""What a run that is spread over workers has done so far, and how long the rest may take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

from qeff_validate.pipeline.executors.units import Unit


class Overview:
    """Counts what has ended.

    Args:
        units: of the run.
        seconds: how long a unit took in an earlier run; None if it never ran.
        results: how many are to be made.
    """

    def __init__(self, units: Sequence[Unit], seconds: Callable[[Unit], float | None], results: int) -> None:
        self._waiting, self._count, self._results = {unit.id: unit for unit in units}, len(units), results
        self._seconds, self._taken = seconds, defaultdict[str, list[float]](list)
        self._hits, self._hosts = 0, set[str]()

    def end(self, unit: Unit, seconds: float, hits: int, host: str) -> None:
        """Take note that a unit has ended.

        Args:
            unit: has ended.
            seconds: its duration.
            hits: how many entries it found in the store.
            host: on which it ran.
        """
        self._waiting.pop(unit.id, None)
        self._taken[unit.stage].append(seconds)
        self._hits += hits
        self._hosts.add(host)

    def give_up(self, unit: Unit) -> None:
        """Take note that a unit will not be done."""
        self._waiting.pop(unit.id, None)

    def text(self, made: int, workers: int) -> str:
        """Return a line such as ``12 of 60 results, 40 of 180 units, 8 workers on 3 hosts, 9 from the store``.

        If of every stage that is left something is known, it ends with such as ``about 4 min left``.

        Args:
            made: how many results there are.
            workers: how many run.
        """
        parts = [f"{made} of {self._results} results", f"{self._count - len(self._waiting)} of {self._count} units"]
        hosts = f" on {len(self._hosts)} hosts" if len(self._hosts) > 1 else ""
        parts.append(f"{workers} worker{'s' if workers > 1 else ''}{hosts}")
        parts.append(f"{self._hits} from the store")
        left = self._seconds_left(workers)
        if left is not None:
            parts.append(f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left")
        return ", ".join(parts)

    def _seconds_left(self, workers: int) -> float | None:
        """Return what the units that have not ended are expected to take; None if of some stage nothing is known."""
        left = 0.0
        for unit in self._waiting.values():
            known = self._seconds(unit)
            if known is None and not self._taken[unit.stage]:
                return None
            left += fmean(self._taken[unit.stage]) if known is None else known
        return left / max(1, workers)
