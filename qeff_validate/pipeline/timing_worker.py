# SPDX-License-Identifier: Apache-2.0
"""One launch: a process that opens one or two programs, warms them up, and times them in turn (A B B A).

python -m qeff_validate.pipeline.timing_worker JOB RESULT PARENT

The job is a JSON file (`performance.Launch`), so is the result. All artifacts are in the store already.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate import errors
from qeff_validate.builders.store import Store
from qeff_validate.comparison.timing import least_shots, warmup_length
from qeff_validate.config.case import Case
from qeff_validate.errors import IncomparableError, ValidateError
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.machine import (
    MachineWatch,
    kernel_seconds,
    machine_fingerprint,
    reset_resident_peak,
    resident_mb,
    resident_peak_mb,
)
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Runtime, Session, Settings, Workload, capabilities, model_kind, runtime
from qeff_validate.sdk.processes import die_with_parent

BLOCK_SECONDS = 0.01
"""Least duration of a block of shots: a hundred times a clock's reading and a scheduler's wake-up."""

ROUNDS = (5, 40)
"""Least and greatest number of rounds of a launch."""

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


def launch(job: Mapping[str, Any]) -> dict[str, Any]:
    """Open, warm up and time what a job names; return plain data.

    Raises:
        ValidateError: a program cannot be opened or fails in a run, or two programs have no workload in common.
    """
    settings = Settings(**{**job["settings"], "device_ids": tuple(job["settings"]["device_ids"])})
    cases = [Case.model_validate(plain) for plain in job["cases"]]
    opened: dict[int, Side] = {}
    watch = MachineWatch()
    with ExitStack() as held:
        for at in job["order"]:  # who is opened first lies elsewhere in memory, so launches take turns
            adapter = runtime(job["runtime"], settings)
            opened[at] = held.enter_context(_side(cases[at], adapter, Path(job["store"])))
        sides = [opened[at] for at in sorted(opened)]
        common = [name for name in sides[-1].workloads if all(name in side.workloads for side in sides)]
        if not common:
            listed = " and ".join(str(list(side.workloads)) for side in sides)
            raise IncomparableError(f"baseline and candidate have no workload in common: {listed}")
        timed = [time_workload(name, sides, job) for name in common]
    return {
        "sides": [dict(side.facts) for side in sides],
        "opened_first": job["order"][0],
        "workloads": timed,
        "unpaired": sorted({name for side in sides for name in side.workloads} - set(common)),
        "machine": watch.stop(),
        "fingerprint": machine_fingerprint(job["settings"]),
    }


@contextmanager
def _side(case: Case, adapter: Runtime, store: Path) -> Iterator[Side]:
    kind = model_kind(case)
    pipeline = Pipeline(case, kind.options.model_validate(case.options), Store(store), Silent())
    inputs, model = pipeline.inputs(), pipeline.model()
    if not hasattr(model, "workloads"):
        raise IncomparableError(f"the model kind {case.model!r} says not what to time: give its model `workloads`")
    if adapter.kind != "module":  # looking it up in the store is no part of opening it; loading a module is
        pipeline.artifact(adapter.kind, capabilities(adapter).sdk)
    reset_resident_peak()
    memory, device, start = resident_mb(), _device_free(adapter), time.perf_counter()
    with pipeline.session(adapter) as session:
        loaded = time.perf_counter() - start
        workloads = {workload.name: workload for workload in model.workloads(session, inputs)}
        side = Side(session, workloads, {})
        for name in workloads:  # memory is taken by the first run, not by opening
            side.prepare(name)
            side.shots(name, 1)
        peak, free = resident_peak_mb(), _device_free(adapter)
        side.facts = {
            "load_s": loaded,
            "host_mb": None if peak is None or memory is None else max(peak - memory, 0.0),
            "device_mb": None if device is None or free is None else max(device - free, 0.0),
        }
        yield side


def _device_free(adapter: Runtime) -> float | None:
    """Return the free memory of all cards, in 10^6 bytes; None where no SDK tells (card-contract §1.4)."""
    able = capabilities(adapter)
    if able.sdk is None or able.simulated:
        return None
    values = [card.values.get("Dram Free", "").split() for card in able.sdk.cards()]
    numbers = [float(value[0]) for value in values if value and value[0].replace(".", "", 1).isdigit()]
    return sum(numbers) if numbers else None


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
    kernel = []
    for at in range(rounds):
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


def main(arguments: Sequence[str]) -> int:
    """Run the job in a file and write its result, or the error, into another."""
    job, result, parent = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    die_with_parent()
    if os.getppid() != parent:
        return 1  # it died before we could ask
    try:
        made = launch(json.loads(job.read_text(encoding="utf-8")))
    except ValidateError as exc:
        known = next(cls for cls in type(exc).__mro__ if getattr(errors, cls.__name__, None) is cls)
        made = {"error": known.__name__, "text": str(exc)}
    result.write_text(json.dumps(made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
