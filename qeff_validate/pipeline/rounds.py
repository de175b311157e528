# SPDX-License-Identifier: Apache-2.0
"""Warm-up and rounds of one launch: one or two open programs, timed in turns (A B B A)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qeff_validate.comparison.timing import least_shots, warmup_length
from qeff_validate.pipeline.machine import kernel_seconds
from qeff_validate.protocols import Session, Workload

BLOCK_SECONDS = 0.01
"""Least duration of a block of shots.

The first shots of a block find the other program's data in the caches: with blocks of a single shot of 0.9 ms a
log ratio of 0.094 showed as 0.072, with blocks of 10 ms as 0.094 (docs/timing-gate.md).
"""

ROUNDS = (5, 40)
"""Least and greatest number of rounds of a launch."""

MOST_TIMES = 4.0
"""How many times the planned seconds a workload may take, where a launch is slower than the one that planned."""

WARM_UP = (8, 200)
"""Least and greatest number of shots before the timed ones."""

WARM_UP_SHARE = 0.5
"""Of the time of a workload that its warm-up may take, beyond the least number of shots."""


class Side:
    """A program that is open: baseline or candidate.

    Attributes:
        facts: seconds to load it, memory that it added.
    """

    def __init__(self, session: Session, workloads: Mapping[str, Workload], facts: Mapping[str, float | None]) -> None:
        self._session, self.workloads, self.facts = session, workloads, facts

    def prepare(self, name: str) -> None:
        """Set the retained state that a workload starts from."""
        self._session.reset()
        for feeds in self.workloads[name].before:
            self._session.run(feeds, fetch=self.workloads[name].fetch)

    def shots(self, name: str, count: int) -> list[float]:
        """Return the seconds of some shots."""
        workload, times = self.workloads[name], []
        for _ in range(count):
            start = time.perf_counter()
            for feeds in workload.feeds:
                self._session.run(feeds, fetch=workload.fetch)
            times.append((time.perf_counter() - start) / workload.count)
        return times

    def warm_up(self, name: str, seconds: float) -> tuple[int, bool, float]:
        """Run shots until they get no faster.

        Returns:
            How many were warm-up, whether they settled in time, and the median of those after it, in seconds.
        """
        least, most = WARM_UP
        times, start = self.shots(name, least), time.perf_counter()
        dropped = warmup_length(np.array(times))
        while dropped > len(times) // 2 and len(times) < most and time.perf_counter() - start < seconds:
            times += self.shots(name, least)
            dropped = warmup_length(np.array(times))
        settled = dropped <= len(times) // 2
        return dropped, settled, float(np.median(times[dropped:] if settled else times[-least:]))


def time_workload(name: str, sides: Sequence[Side], job: Mapping[str, Any]) -> dict[str, Any]:
    """Warm one workload up on each side and time it in turns.

    Args:
        name: of the workload; every side has it.
        sides: open programs, baseline first.
        job: has ``seconds``, ``launches``, ``quantile`` and ``plan``.

    Returns:
        Plain data; ``seconds`` is ``[sides][rounds][shots]``.
    """
    workload = sides[-1].workloads[name]
    warm_ups = []
    for side in sides:
        side.prepare(name)
        warm_ups.append(side.warm_up(name, job["seconds"] * WARM_UP_SHARE))
    rounds, shots = job["plan"].get(name) or _plan(max(typical for *_, typical in warm_ups), len(sides), job)
    turns = [*range(len(sides)), *reversed(range(len(sides)))]
    seconds: list[list[list[float]]] = [[] for _ in sides]
    kernel, start = list[float](), time.perf_counter()
    for at in range(rounds):
        if at >= ROUNDS[0] and time.perf_counter() - start > MOST_TIMES * job["seconds"]:
            break
        kernel.append(kernel_seconds())
        for taken in seconds:
            taken.append([])
        for turn in turns if at % 2 == 0 else turns[::-1]:  # who comes first takes turns, too
            seconds[turn][at] += sides[turn].shots(name, shots)
    return {
        "name": name,
        "quantity": workload.quantity,
        "rows": workload.rows,
        "tokens": workload.tokens,
        "plan": [rounds, shots],
        "warm_up": [dropped for dropped, _, _ in warm_ups],
        "settled": all(settled for _, settled, _ in warm_ups),
        "seconds": seconds,
        "kernel": kernel,
    }


def _plan(typical: float, sides: int, job: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of rounds, and of shots in a block, so that a workload takes the seconds of the job.

    Args:
        typical: seconds of a shot.
        sides: programs; each has two blocks in a round.
        job: has ``seconds``, ``launches`` and the greatest ``quantile`` with a budget.
    """
    shots = min(max(1, math.ceil(BLOCK_SECONDS / typical)), 100)
    rounds = round(job["seconds"] / (2 * sides * shots * typical))
    needed = math.ceil(least_shots(job["quantile"]) / (job["launches"] * 2 * shots)) if job["quantile"] else 0
    least, most = ROUNDS
    return max(min(max(rounds, least), most), needed), shots
