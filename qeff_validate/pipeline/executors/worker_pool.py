# SPDX-License-Identifier: Apache-2.0
"""Units of cases side by side on workers, wherever these are."""

from __future__ import annotations

import itertools
import queue
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any, Protocol

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.errors import Unavailable
from qeff_validate.pipeline.executors.schedule import Schedule
from qeff_validate.pipeline.executors.unit_costs import UnitCosts
from qeff_validate.pipeline.executors.units import JUDGES, Unit, plan
from qeff_validate.pipeline.explanation import ExplainMode
from qeff_validate.pipeline.stages import NumberedProgress, Progress
from qeff_validate.protocols import Runtime, Settings, capabilities
from qeff_validate.report.result import Result


class Worker(Protocol):
    """Does one unit after the other, and keeps its case loaded.

    Attributes:
        place: its number.
        steps: that it shows at the moment, by number.
        is_ready: it has sent a message, so it does not wait for a place on a host.
    """

    place: int
    steps: dict[int, AbstractContextManager[None]]
    is_ready: bool

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; that a worker is lost is told by its last one."""

    def how_it_ended(self) -> str:
        """Return how a worker ended that was lost, such as ``was killed by SIGKILL``."""

    def ask_to_end(self) -> None:
        """Ask the worker to clean up and end."""

    def end(self) -> None:
        """Wait for the end of a worker that was asked to, and release what it held."""


Message = tuple[Worker, dict[str, Any] | None]
"""What a worker sends; None: it is lost."""


class WorkerPool(ABC):
    """Does the units of cases side by side on workers, each of which keeps its case loaded.

    Args:
        runtime: returns the runtime of a name.
        store: through which workers hand on what they make.
        settings: of the runtimes.
        progress: shows what they do.
        explain: whether results that fail get an explanation.
        memory_mb: what all units together may take, in 10^6 bytes, by the estimates of `UnitCosts`.
    """

    scarce = False
    """Idle workers hold what a worker that begins waits for."""

    def __init__(
        self,
        runtime: Callable[[str], Runtime],
        *,
        store: Store,
        settings: Settings,
        progress: Progress,
        explain: ExplainMode = "off",
        memory_mb: float = float("inf"),
    ) -> None:
        self._runtime, self._progress, self._memory_mb = runtime, progress, memory_mb
        self._shown = NumberedProgress(progress, 1)
        self._costs, self._places = UnitCosts(store.root), itertools.count()
        self._job: dict[str, Any] = {"store": store.location, "settings": asdict(settings), "explain": explain}

    @abstractmethod
    def places(self) -> int:
        """Return how many workers there may be now."""

    @abstractmethod
    def start(self, place: int, job: Mapping[str, Any], messages: queue.SimpleQueue[Message]) -> Worker:
        """Start a worker.

        Args:
            place: its number.
            job: cases, settings and store.
            messages: takes what it sends.
        """

    def close(self) -> None:  # noqa: B027 (most pools hold nothing but their workers)
        """Release what the pool holds beside its workers."""

    def results(self, planned: Sequence[tuple[Case, str]]) -> Generator[tuple[Case, str, Result]]:
        """Yield each result as it is made; closing the iterator ends all workers.

        Args:
            planned: cases, and names of runtimes.
        """
        cases = {case.name: case for case, _ in planned}
        job = {**self._job, "cases": [case.model_dump(mode="json") for case in cases.values()]}
        usable = {name for name in {name for _, name in planned} if self._runtime(name).probe() is None}
        runtimes = {case: [name for other, name in planned if other.name == case and name in usable] for case in cases}
        units = plan(planned, self._runtime)
        estimates = {unit.id: self._costs.megabytes(unit, cases[unit.case]) for unit in units}
        schedule = Schedule(units, estimates, self._memory_mb, self._cards(units))
        self._shown = NumberedProgress(self._progress, len(planned))
        messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        workers: dict[int, Worker] = {}
        try:
            changed = True  # whether a unit may begin that could not before
            while not schedule.done:
                if changed:
                    self._start_units(schedule, workers, runtimes, lambda place: self.start(place, job, messages))
                worker, message = messages.get()
                changed = message is None or "megabytes" in message
                if worker is not workers.get(worker.place):
                    continue  # the last word of one that was ended
                worker.is_ready = True
                if message is None:
                    del workers[worker.place]
                    unit = schedule.lose(worker.place, self._end_of(worker))
                    if unit is not None and unit.stage == JUDGES:
                        self._shown.number += 1
                        yield cases[unit.case], unit.runtime, _given_up(unit, schedule.losses[unit.id])
                elif "megabytes" in message:
                    unit = schedule.end(worker.place)
                    self._costs.keep(unit, message["seconds"], message["megabytes"])
                    if message["result"] is not None:
                        self._shown.number += 1
                        result = _with_history(Result.from_plain(message["result"]), schedule.losses.get(unit.id, []))
                        yield cases[unit.case], unit.runtime, result
                else:
                    self._show(worker, message)
        finally:
            try:
                _end([*workers.values()])
            finally:
                self.close()

    def _start_units(
        self,
        schedule: Schedule,
        workers: dict[int, Worker],
        runtimes: Mapping[str, Sequence[str]],
        start: Callable[[int], Worker],
    ) -> None:
        """Give each free place a unit, and end the workers of those that get none any more."""
        for place in [*workers]:
            self._start_unit(place, schedule, workers, runtimes, start)
        while len(workers) < self.places() and self._start_unit(next(self._places), schedule, workers, runtimes, start):
            pass
        wanted = any(not worker.is_ready for worker in workers.values()) and self.scarce
        if wanted or not schedule.waits:  # what idle workers hold is for those that begin, or nobody needs it
            _end([workers.pop(place) for place in [*workers] if not schedule.is_busy(place)])

    def _start_unit(
        self,
        place: int,
        schedule: Schedule,
        workers: dict[int, Worker],
        runtimes: Mapping[str, Sequence[str]],
        start: Callable[[int], Worker],
    ) -> bool:
        """Give a unit to a place that is free; return whether there was one."""
        unit = None if schedule.is_busy(place) else schedule.take(place)
        if unit is None:
            return False
        if place not in workers:
            workers[place] = start(place)
        names = [unit.runtime] if unit.stage == "compile" else runtimes[unit.case]
        workers[place].send({"unit": asdict(unit), "runtimes": names, "device_ids": schedule.cards_of(place)})
        return True

    def _cards(self, units: Sequence[Unit]) -> Sequence[int]:
        """Return the cards to use: those that the settings name, else all Ready ones, the most free first."""
        named: Sequence[int] = self._job["settings"]["device_ids"]
        name = next((unit.runtime for unit in units if unit.cards), None)
        sdk = None if name is None else capabilities(self._runtime(name)).sdk
        if named or sdk is None:
            return named
        with suppress(Unavailable):  # the run says why there is none
            return [card.qid for card in sdk.ready()]
        return ()

    def _end_of(self, worker: Worker) -> str:
        """Clean up after a worker that was lost; return how."""
        how = worker.how_it_ended()
        _end([worker])
        self._progress.line(f"a worker {how}; another one takes its work")
        return how

    def _show(self, worker: Worker, message: Mapping[str, Any]) -> None:
        if "begin" in message:
            step = worker.steps[message["step"]] = self._shown.step(message["begin"])
            step.__enter__()
        elif "end" in message:
            worker.steps.pop(message["end"]).__exit__(None, None, None)
        else:
            self._progress.line(message["line"])


def _end(workers: Sequence[Worker]) -> None:
    """End workers and the steps that they show."""
    with ExitStack() as steps:  # they raise again if Ctrl-C came, so they are closed last
        for worker in workers:
            worker.ask_to_end()
        for worker in workers:
            worker.end()
            for step in worker.steps.values():
                steps.push(step)


def _given_up(unit: Unit, history: Sequence[str]) -> Result:
    return Result(unit.case, unit.runtime, "error", f"its worker {_times(history)}; given up", stage=unit.stage)


def _with_history(result: Result, history: Sequence[str]) -> Result:
    if not history:
        return result
    return replace(result, notes=(*result.notes, f"begun anew, because its worker {_times(history)}"))


def _times(history: Sequence[str]) -> str:
    """Say what happened to the processes of a unit, the same thing once."""
    counts = Counter(history)
    return ", then ".join(how if count == 1 else f"{how} ({count} times)" for how, count in counts.items())
