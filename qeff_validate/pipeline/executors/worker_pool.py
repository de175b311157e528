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
from functools import partial
from typing import Any, Protocol

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.errors import Unavailable
from qeff_validate.pipeline.executors.overview import Overview
from qeff_validate.pipeline.executors.schedule import Schedule
from qeff_validate.pipeline.executors.unit_costs import UnitCosts
from qeff_validate.pipeline.executors.units import JUDGES, Unit, is_usable_here, plan
from qeff_validate.pipeline.explanation import ExplainMode
from qeff_validate.pipeline.stages import NumberedProgress, OverviewProgress, Progress
from qeff_validate.protocols import Runtime, Settings, capabilities
from qeff_validate.report.result import Result


class Worker(Protocol):
    """Does one unit after the other, and keeps its case loaded.

    Attributes:
        place: its number.
        steps: that it shows at the moment, by number.
        is_ready: it has sent a message, so it does not wait for a place on a host.
        is_avoided: its host can do no such work, so it gets none any more.
    """

    place: int
    steps: dict[int, AbstractContextManager[None]]
    is_ready: bool
    is_avoided: bool

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
        self._shown, self._overview = NumberedProgress(progress, 1), Overview((), lambda _: None, 0)
        self._costs, self._places = UnitCosts(store.root), itertools.count()
        self._job: dict[str, Any] = {"store": store.location, "settings": asdict(settings), "explain": explain}

    @abstractmethod
    def places(self) -> int:
        """Return how many workers there may be now."""

    @abstractmethod
    def start(self, place: int, unit: Unit, job: Mapping[str, Any], messages: queue.SimpleQueue[Message]) -> Worker:
        """Start a worker.

        Args:
            place: its number.
            unit: what it begins with.
            job: cases, settings and store.
            messages: takes what it sends.
        """

    def is_usable(self, runtime: Runtime) -> bool:
        """Return whether a runtime can be used where the workers are."""
        return is_usable_here(runtime)

    def fits(self, worker: Worker, unit: Unit) -> bool:  # noqa: ARG002
        """Return whether a worker can do a unit, besides that with which it began."""
        return True

    def avoid(self, worker: Worker, message: Mapping[str, Any], schedule: Schedule) -> bool:  # noqa: ARG002
        """Keep units away from what failed on a worker's host; return False if there is nowhere else to go.

        Args:
            worker: on that host.
            message: its last one, with a ``fault`` as `worker.host_fault` returns it.
            schedule: of the units.
        """
        cards = message["fault"]["cards"]
        return bool(cards) and schedule.withdraw(cards)

    def close(self) -> None:  # noqa: B027 (most pools hold nothing but their workers)
        """Release what the pool holds beside its workers."""

    def results(self, planned: Sequence[tuple[Case, str]]) -> Generator[tuple[Case, str, Result]]:
        """Yield each result as it is made; closing the iterator ends all workers.

        Args:
            planned: cases, and names of runtimes.
        """
        cases = {case.name: case for case, _ in planned}
        job = {**self._job, "cases": [case.model_dump(mode="json") for case in cases.values()]}
        usable = {name for name in {name for _, name in planned} if self.is_usable(self._runtime(name))}
        runtimes = {case: [name for other, name in planned if other.name == case and name in usable] for case in cases}
        units = plan(planned, self._runtime, self.is_usable)
        self.megabytes = {unit.id: self._costs.megabytes(unit, cases[unit.case]) for unit in units}
        schedule = Schedule(units, self.megabytes, self._memory_mb, self.cards(units))
        self._shown = NumberedProgress(self._progress, len(planned))
        self._overview = Overview(units, self._costs.seconds, len(planned))
        messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        workers: dict[int, Worker] = {}
        try:
            changed = True  # whether a unit may begin that could not before
            while not schedule.done:
                if changed:
                    self._start_units(schedule, workers, runtimes, partial(self.start, job=job, messages=messages))
                    if isinstance(self._progress, OverviewProgress):
                        self._progress.overview(self._overview.text(self._shown.number - 1, len(workers)))
                worker, message = messages.get()
                changed = message is None or "megabytes" in message
                if worker is not workers.get(worker.place):
                    continue  # the last word of one that was ended
                worker.is_ready = True
                if message is not None and not changed:
                    self._show(worker, message)
                    continue
                result = self._ended(schedule, worker, message)
                if message is None or worker.is_avoided:
                    del workers[worker.place]
                if result is not None:
                    self._shown.number += 1
                    yield cases[result.case], result.runtime, result
        finally:
            try:
                _end([*workers.values()])
            finally:
                self.close()

    def _ended(self, schedule: Schedule, worker: Worker, message: Mapping[str, Any] | None) -> Result | None:
        """Take note of the end of a unit, or of the loss of its worker; return the result if there is one now."""
        place = worker.place
        if message is None:
            how = worker.how_it_ended()
            _end([worker])
            self._progress.line(f"a worker {how}; another one takes its work")
            given_up = schedule.lose(place, how)
            if given_up is not None:
                self._overview.give_up(given_up)
            if given_up is None or given_up.stage != JUDGES:
                return None
            return _given_up(given_up, schedule.losses[given_up.id])
        result = None if message["result"] is None else Result.from_plain(message["result"])
        fault = message["fault"]
        if fault is not None and self.avoid(worker, message, schedule):
            self._progress.line(f"a worker {fault['reason']}; another one takes its work")
            if worker.is_avoided:
                _end([worker])
            unit = schedule.lose(place, fault["reason"])
            if unit is None:
                return None
            self._overview.give_up(unit)
        else:
            unit = schedule.end(place)
            self._costs.keep(unit, message["seconds"], message["megabytes"])
            self._overview.end(unit, message["seconds"], message["hits"], message["host"])
        return None if result is None else _with_history(result, schedule.losses.get(unit.id, []))

    def _start_units(
        self,
        schedule: Schedule,
        workers: dict[int, Worker],
        runtimes: Mapping[str, Sequence[str]],
        start: Callable[[int, Unit], Worker],
    ) -> None:
        """Give each free place a unit, and end the workers of those that get none any more."""
        for place in [*workers]:
            self._start_unit(place, schedule, workers, runtimes, start)
        self._end_idle(schedule, workers, lambda worker: any(self.fits(worker, unit) for unit in schedule.waiting))
        while len(workers) < self.places() and self._start_unit(next(self._places), schedule, workers, runtimes, start):
            pass
        if self.scarce and any(not worker.is_ready for worker in workers.values()):
            self._end_idle(schedule, workers, lambda _: False)  # what they hold is for those that begin

    @staticmethod
    def _end_idle(schedule: Schedule, workers: dict[int, Worker], is_needed: Callable[[Worker], bool]) -> None:
        """End workers without a unit that are not needed any more."""
        idle = [place for place in [*workers] if not schedule.is_busy(place) and not is_needed(workers[place])]
        _end([workers.pop(place) for place in idle])

    def _start_unit(
        self,
        place: int,
        schedule: Schedule,
        workers: dict[int, Worker],
        runtimes: Mapping[str, Sequence[str]],
        start: Callable[[int, Unit], Worker],
    ) -> bool:
        """Give a unit to a place that is free; return whether there was one."""
        worker = workers.get(place)
        unit = (
            None
            if schedule.is_busy(place)
            else schedule.take(place, lambda one: worker is None or self.fits(worker, one))
        )
        if unit is None:
            return False
        if worker is None:
            worker = workers[place] = start(place, unit)
        names = [unit.runtime] if unit.stage == "compile" else runtimes[unit.case]
        worker.send({"unit": asdict(unit), "runtimes": names, "device_ids": self.device_ids(schedule, place)})
        return True

    def device_ids(self, schedule: Schedule, place: int) -> Sequence[int]:
        """Return the ids of the cards that the unit of a place is to use; empty: those that its host has free."""
        return schedule.cards_of(place)

    def cards(self, units: Sequence[Unit]) -> Sequence[int]:
        """Return the cards to use: those that the settings name, else all Ready ones, the most free first."""
        named: Sequence[int] = self._job["settings"]["device_ids"]
        name = next((unit.runtime for unit in units if unit.cards), None)
        sdk = None if name is None else capabilities(self._runtime(name)).sdk
        if named or sdk is None:
            return named
        with suppress(Unavailable):  # the run says why there is none
            return [card.qid for card in sdk.ready()]
        return ()

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
