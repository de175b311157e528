# SPDX-License-Identifier: Apache-2.0
"""Units of cases side by side on the hosts of a Ray cluster; the cluster is Ray's, the order of units is ours."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import first_line
from qeff_validate.pipeline.executors.local_processes import THREADS
from qeff_validate.pipeline.executors.worker_pool import Message, Worker, WorkerPool
from qeff_validate.protocols import Runtime, Settings
from qeff_validate.runtimes.isolation.parent import child_environment

LOCAL = "local"
"""Instead of an address: a cluster of this host alone, which ends with the run."""


CONNECT_SECONDS = 10
"""How long the head of a cluster may take to accept a connection."""


class UnitActor:
    """What runs on a host of the cluster; Ray makes an actor of it.

    Args:
        job: as `worker.UnitServer` takes it.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        from qeff_validate.pipeline.executors.worker import UnitServer

        self._messages: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._server = UnitServer(job, self._messages.put)

    def do(self, request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Do a unit and yield its messages as they are sent; the last one has the memory it took."""
        threading.Thread(target=self._server.do, args=(request,), daemon=True).start()
        while True:
            message = self._messages.get()
            yield message
            if "megabytes" in message:
                return


class RayWorker:
    """A worker in an actor of the cluster.

    Args:
        place: its number.
        actor: handle of a `UnitActor`.
        messages: takes what it sends, and None if it is lost.
    """

    def __init__(self, place: int, actor: Any, messages: queue.SimpleQueue[Message]) -> None:
        self.place, self.is_ready = place, False
        self.steps: dict[int, AbstractContextManager[None]] = {}
        self._actor, self._messages, self._how = actor, messages, ""
        self._listener: threading.Thread | None = None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a unit."""
        stream = self._actor.do.options(num_returns="streaming").remote(dict(message))
        self._listener = threading.Thread(target=self._listen, args=(stream,), daemon=True)
        self._listener.start()

    def how_it_ended(self) -> str:
        """Return what Ray says of the end of the actor."""
        return f"was lost ({self._how})"

    def ask_to_end(self) -> None:
        """End the actor at once; the store drops what it has half-made."""
        import ray

        ray.kill(self._actor)

    def end(self) -> None:
        """Wait until nothing is heard of it any more."""
        if self._listener is not None:
            self._listener.join()

    def _listen(self, stream: Any) -> None:
        import ray

        try:
            for reference in stream:
                self._messages.put((self, ray.get(reference)))
        except Exception as exc:  # of Ray: the actor, its process or its host is gone
            self._how = first_line(exc)
            self._messages.put((self, None))


class RayCluster(WorkerPool):
    """Workers in actors of a Ray cluster, one processor each. Its hosts share the store's directory.

    Args:
        address: of the cluster, such as ``ray://head:10001`` or ``auto``; ``local``: a cluster of this host alone.
        runtime: returns the runtime of a name.
        settings: of the runtimes; if it names no number of threads, each worker has one.
        jobs: greatest number of workers; None: as many as the cluster has processors.
        more: of `WorkerPool`.

    Raises:
        MissingPackage: Ray is not installed.
        ConfigError: there is no cluster at this address.
    """

    scarce = True

    def __init__(
        self,
        address: str,
        runtime: Callable[[str], Runtime],
        *,
        settings: Settings,
        jobs: int | None = None,
        **more: Any,
    ) -> None:
        settings = settings if settings.threads is not None else replace(settings, threads=1)
        super().__init__(runtime, settings=settings, **more)
        self._jobs, self._variables = jobs, {name: os.environ.get(name, "1") for name in THREADS}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask the network
        import ray

        if address == LOCAL:
            self._variables["PYTHONPATH"] = child_environment()["PYTHONPATH"]
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        alone: dict[str, Any] = {"include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
        _check_reachable(address)
        try:
            ray.init(address=address, **quiet, **(alone if address == LOCAL else {}))
        except (ConnectionError, ValueError, RuntimeError) as exc:
            raise ConfigError(f"--cluster: cannot reach a Ray cluster at {address!r}: {first_line(exc)}") from exc

    def places(self) -> int:
        """Return the number of processors of the hosts that are there now."""
        import ray

        processors = int(ray.cluster_resources().get("CPU", 0))
        return max(1, processors if self._jobs is None else min(processors, self._jobs))

    def start(self, place: int, job: Mapping[str, Any], messages: queue.SimpleQueue[Message]) -> Worker:
        """Start an actor wherever Ray has a free processor."""
        import ray

        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "runtime_env": {"env_vars": self._variables}}
        return RayWorker(place, ray.remote(UnitActor).options(**options).remote(dict(job)), messages)

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        import ray

        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConfigError if nothing listens at ``HOST:PORT`` or ``ray://HOST:PORT``; Ray would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"--cluster: nothing answers at {address!r}: {exc}; is that the address of the head?"
        ) from exc
