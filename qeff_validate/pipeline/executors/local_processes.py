# SPDX-License-Identifier: Apache-2.0
"""Units of cases side by side, in processes of this host."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qeff_validate.config.case import Case
from qeff_validate.pipeline.executors.schedule import Schedule
from qeff_validate.pipeline.executors.unit_costs import UnitCosts
from qeff_validate.pipeline.executors.units import JUDGES, Unit, plan
from qeff_validate.pipeline.explanation import ExplainMode
from qeff_validate.pipeline.stages import Progress
from qeff_validate.protocols import Runtime, Settings
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.runtimes.isolation.parent import child_environment
from qeff_validate.sdk.processes import ending, kill

WORKER = "qeff_validate.pipeline.executors.worker"
"""The module that a process runs."""

GRACE_SECONDS = 10
"""How long a process may clean up before it is killed."""

TAIL_BYTES = 2048
"""How much of a lost process's output is read."""

THREADS = ("OMP_NUM_THREADS", "QAIC_SIM_THREADS")
"""Environment variables with the number of threads of torch and of the simulator."""

Message = tuple["Worker", dict[str, Any] | None]


class Worker:
    """A process and the steps that it shows.

    Args:
        place: its number; another one takes it if this process is lost.
        job: its first message.
        threads: of each library in it.
        messages: takes what it sends, and None at its end.
    """

    def __init__(self, place: int, job: Mapping[str, Any], threads: int, messages: queue.SimpleQueue[Message]) -> None:
        self.place = place
        self.steps: dict[int, AbstractContextManager[None]] = {}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        parent_end, child_end = socket.socketpair()
        self._channel = Channel(parent_end)
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(child_end.fileno()), str(os.getpid())],
                env={**child_environment(), **{name: os.environ.get(name, str(threads)) for name in THREADS}},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[child_end.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent, which ends it
            )
        self._listener = threading.Thread(target=self._listen, args=(messages,), daemon=True)
        self._listener.start()
        self.send(job)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; that a process has ended is told by its last one."""
        with suppress(Closed):
            self._channel.send(message)

    def how_it_ended(self) -> str:
        """Return how a process ended that has closed its channel, with the last line that it printed."""
        try:
            code = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            kill(self.process)
            code = self.process.returncode
        self._output.seek(max(self._output.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        lines = self._output.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{ending(code)}{f' ({said})' if said else ''}"

    def ask_to_end(self) -> None:
        """Ask the process to clean up and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait for the end of a process that was asked to; kill it, and what it has started, after `GRACE_SECONDS`."""
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            kill(self.process)
        self._listener.join()  # nobody holds the other end any more
        self._channel.close()
        self._output.close()

    def _listen(self, messages: queue.SimpleQueue[Message]) -> None:
        with suppress(Closed, OSError):
            while True:
                messages.put((self, self._channel.receive()[0]))
        messages.put((self, None))


class LocalProcesses:
    """Does the units of cases side by side in processes of this host, each of which keeps its case loaded.

    Args:
        jobs: the number of processes; the processors are divided among them.
        runtime: returns the runtime of a name.
        store: directory of the store, through which they hand on what they make.
        settings: of the runtimes.
        progress: shows what they do.
        explain: whether results that fail get an explanation.
        memory_mb: what all units together may take, in 10^6 bytes, by the estimates of `UnitCosts`.
    """

    def __init__(
        self,
        jobs: int,
        runtime: Callable[[str], Runtime],
        *,
        store: Path,
        settings: Settings,
        progress: Progress,
        explain: ExplainMode = "off",
        memory_mb: float = float("inf"),
    ) -> None:
        self._jobs, self._runtime, self._progress, self._memory_mb = jobs, runtime, progress, memory_mb
        self._threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        settings = settings if settings.threads is not None else replace(settings, threads=self._threads)
        self._costs = UnitCosts(store)
        self._job: dict[str, Any] = {"store": str(store), "settings": asdict(settings), "explain": explain}

    def results(self, planned: Sequence[tuple[Case, str]]) -> Generator[tuple[Case, str, Result]]:
        """Yield each result as it is made; closing the iterator ends all processes.

        Args:
            planned: cases, and names of runtimes.
        """
        cases = {case.name: case for case, _ in planned}
        job = {**self._job, "cases": [case.model_dump(mode="json") for case in cases.values()]}
        usable = {name for name in {name for _, name in planned} if self._runtime(name).probe() is None}
        runtimes = {case: [name for other, name in planned if other.name == case and name in usable] for case in cases}
        units = plan(planned, self._runtime)
        estimates = {unit.id: self._costs.megabytes(unit, cases[unit.case]) for unit in units}
        schedule = Schedule(units, estimates, self._memory_mb)
        messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        workers: dict[int, Worker] = {}
        try:
            while not schedule.done:
                for place in range(self._jobs):
                    unit = None if schedule.is_busy(place) else schedule.take(place)
                    if unit is not None:
                        if place not in workers:
                            workers[place] = Worker(place, job, self._threads, messages)
                        names = [unit.runtime] if unit.stage == "compile" else runtimes[unit.case]
                        workers[place].send({"unit": asdict(unit), "runtimes": names})
                worker, message = messages.get()
                if message is None:
                    del workers[worker.place]
                    unit = schedule.lose(worker.place, self._end_of(worker))
                    if unit is not None and unit.stage == JUDGES:
                        yield cases[unit.case], unit.runtime, _given_up(unit, schedule.losses[unit.id])
                elif "megabytes" in message:
                    unit = schedule.end(worker.place)
                    self._costs.keep(unit, message["seconds"], message["megabytes"])
                    if message["result"] is not None:
                        result = _with_history(Result.from_plain(message["result"]), schedule.losses.get(unit.id, []))
                        yield cases[unit.case], unit.runtime, result
                else:
                    self._show(worker, message)
        finally:
            _end([*workers.values()])

    def _end_of(self, worker: Worker) -> str:
        """Clean up after a process that has ended by itself; return how."""
        how = worker.how_it_ended()
        _end([worker])
        self._progress.line(f"a worker process {how}; another one takes its work")
        return how

    def _show(self, worker: Worker, message: Mapping[str, Any]) -> None:
        if "begin" in message:
            step = worker.steps[message["step"]] = self._progress.step(message["begin"])
            step.__enter__()
        elif "end" in message:
            worker.steps.pop(message["end"]).__exit__(None, None, None)
        else:
            self._progress.line(message["line"])


def _end(workers: Sequence[Worker]) -> None:
    """End processes and the steps that they show."""
    with ExitStack() as steps:  # they raise again if Ctrl-C came, so they are closed last
        for worker in workers:
            worker.ask_to_end()
        for worker in workers:
            worker.end()
            for step in worker.steps.values():
                steps.push(step)


def _given_up(unit: Unit, history: Sequence[str]) -> Result:
    return Result(unit.case, unit.runtime, "error", f"its worker process {_times(history)}; given up", stage=unit.stage)


def _with_history(result: Result, history: Sequence[str]) -> Result:
    if not history:
        return result
    return replace(result, notes=(*result.notes, f"begun anew, because its worker process {_times(history)}"))


def _times(history: Sequence[str]) -> str:
    """Say what happened to the processes of a unit, the same thing once."""
    counts = Counter(history)
    return ", then ".join(how if count == 1 else f"{how} ({count} times)" for how, count in counts.items())
