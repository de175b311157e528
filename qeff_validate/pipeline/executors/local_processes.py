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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

from qeff_validate.pipeline.executors.units import Unit
from qeff_validate.pipeline.executors.worker_pool import Message, Worker, WorkerPool
from qeff_validate.protocols import Runtime, Settings
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.runtimes.isolation.parent import child_environment
from qeff_validate.sdk.processes import ending, wait_or_kill

WORKER = "qeff_validate.pipeline.executors.worker"
"""The module that a process runs."""

GRACE_SECONDS = 10
"""How long a process may clean up before it is killed."""

TAIL_BYTES = 2048
"""How much of a lost process's output is read."""

THREADS = ("OMP_NUM_THREADS", "QAIC_SIM_THREADS")
"""Environment variables with the number of threads of torch and of the simulator."""


class LocalProcess:
    """A worker in a process of its own.

    Args:
        place: its number.
        job: its first message.
        threads: of each library in it.
        messages: takes what it sends, and None at its end.
    """

    def __init__(self, place: int, job: Mapping[str, Any], threads: int, messages: queue.SimpleQueue[Message]) -> None:
        self.place, self.is_ready, self.is_avoided = place, False, False
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
        code = wait_or_kill(self.process, GRACE_SECONDS)
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
        wait_or_kill(self.process, GRACE_SECONDS)
        self._listener.join()  # nobody holds the other end any more
        self._channel.close()
        self._output.close()

    def _listen(self, messages: queue.SimpleQueue[Message]) -> None:
        with suppress(Closed, OSError):
            while True:
                messages.put((self, self._channel.receive()[0]))
        messages.put((self, None))


class LocalProcesses(WorkerPool):
    """Workers in processes of this host.

    Args:
        jobs: the number of processes; the processors are divided among them.
        runtime: returns the runtime of a name.
        settings: of the runtimes; if it names no number of threads, each has its share.
        more: of `WorkerPool`.
    """

    def __init__(self, jobs: int, runtime: Callable[[str], Runtime], *, settings: Settings, **more: Any) -> None:
        self._jobs, self._threads = jobs, max(1, len(os.sched_getaffinity(0)) // jobs)
        settings = settings if settings.threads is not None else replace(settings, threads=self._threads)
        super().__init__(runtime, settings=settings, **more)

    def places(self) -> int:
        """Return the number of processes."""
        return self._jobs

    def start(
        self,
        place: int,
        unit: Unit,  # noqa: ARG002
        job: Mapping[str, Any],
        messages: queue.SimpleQueue[Message],
    ) -> Worker:
        """Start a process."""
        return LocalProcess(place, job, self._threads, messages)
