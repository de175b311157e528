# SPDX-License-Identifier: Apache-2.0
"""Units of cases side by side on the hosts of a Ray cluster; the cluster is Ray's, the order of units is ours."""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import first_line
from qeff_validate.pipeline.executors.local_processes import THREADS
from qeff_validate.pipeline.executors.schedule import Schedule
from qeff_validate.pipeline.executors.units import Unit, is_real_card
from qeff_validate.pipeline.executors.worker_pool import Message, Worker, WorkerPool
from qeff_validate.protocols import Runtime, Settings
from qeff_validate.runtimes.isolation.parent import child_environment

LOCAL = "local"
"""Instead of an address: a cluster of this host alone, which ends with the run."""

CARDS, COMPILER, MEMORY = "ai100", "qaic_compiler", "memory"
"""Resources of Ray: cards of a host, hosts with the SDK's compiler (without any, those with cards compile), and bytes
of memory. The first two are given to a host when it joins: ``ray start --resources '{"ai100": 8}'``."""

A_LITTLE = 0.001
"""Of a resource, to be where it is without taking it from others."""

REFRESH_SECONDS = 1
"""How old what is known of the hosts may be."""

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
        import ray

        host = ray.get_runtime_context().get_node_id()
        while True:
            message = self._messages.get()
            yield {**message, "host": host} if "host" in message else message
            if "megabytes" in message:
                return


class RayWorker:
    """A worker in an actor of the cluster.

    Args:
        place: its number.
        actor: handle of a `UnitActor`.
        resources: of Ray that it holds.
        messages: takes what it sends, and None if it is lost.
    """

    def __init__(
        self, place: int, actor: Any, resources: Mapping[str, float], messages: queue.SimpleQueue[Message]
    ) -> None:
        self.place, self.is_ready, self.is_avoided = place, False, False
        self.resources = resources
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
    """Workers in actors of a Ray cluster, one processor each. Its hosts share the store's directory or URL.

    Args:
        address: of the cluster, ``HOST:PORT`` of its head or ``auto``, and this host is one of it; ``local``: a cluster
            of this host alone.
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
        self._avoided: set[str] = set()
        self._alive: dict[str, Mapping[str, float]] = {}
        self._asked = -math.inf
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
            raise ConfigError(
                f"--cluster: cannot reach a Ray cluster at {address!r}: {first_line(exc)}; if it asks for a token, set"
                " RAY_AUTH_MODE=token here too"
            ) from exc

    def places(self) -> int:
        """Return the number of processors of the hosts that are there now and not avoided."""
        processors = int(sum(host.get("CPU", 0) for host in self._hosts().values()))
        return max(1, processors if self._jobs is None else min(processors, self._jobs))

    def start(self, place: int, unit: Unit, job: Mapping[str, Any], messages: queue.SimpleQueue[Message]) -> Worker:
        """Start an actor where Ray has a free processor, and what else the unit takes."""
        import ray

        wanted = self._resources(unit)
        options: dict[str, Any] = {
            "num_cpus": 1,
            "max_restarts": 0,
            "memory": wanted.get(MEMORY),
            "resources": {name: amount for name, amount in wanted.items() if name != MEMORY},
            "runtime_env": {"env_vars": self._variables},
        }
        if self._avoided:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._avoided))})"}
        return RayWorker(place, ray.remote(UnitActor).options(**options).remote(dict(job)), wanted, messages)

    def is_usable(self, runtime: Runtime) -> bool:
        """Return whether the cluster has cards for a runtime of real ones, else whether it can be used on this host."""
        return self._most(CARDS) > 0 if is_real_card(runtime) else super().is_usable(runtime)

    def fits(self, worker: Worker, unit: Unit) -> bool:
        """Return whether a worker's actor holds what a unit takes."""
        held = cast(RayWorker, worker).resources
        return all(held.get(name, 0) >= amount for name, amount in self._resources(unit).items())

    def avoid(self, worker: Worker, message: Mapping[str, Any], schedule: Schedule) -> bool:  # noqa: ARG002
        """Start no worker on a host any more; return False if it is the last one."""
        if not self._hosts().keys() - {message["host"]}:
            return False
        self._avoided.add(message["host"])
        worker.is_avoided = True
        return True

    def cards(self, units: Sequence[Unit]) -> Sequence[int]:  # noqa: ARG002
        """Return a number for each card of the cluster, so that no more units begin than there are cards."""
        return range(int(sum(host.get(CARDS, 0) for host in self._hosts().values())))

    def device_ids(self, schedule: Schedule, place: int) -> Sequence[int]:  # noqa: ARG002
        """Return none: a host chooses among its own cards, and the lock on a card keeps others off it."""
        return ()

    def _hosts(self) -> dict[str, Mapping[str, float]]:
        """Return the resources of each host that is there now and not avoided, by id; Ray is asked once a second."""
        import ray

        if time.monotonic() - self._asked >= REFRESH_SECONDS:
            self._alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            self._asked = time.monotonic()
        return {name: resources for name, resources in self._alive.items() if name not in self._avoided}

    def _most(self, resource: str) -> float:
        """Return how much of a resource the host has that has the most."""
        return max((host.get(resource, 0.0) for host in self._hosts().values()), default=0.0)

    def _resources(self, unit: Unit) -> dict[str, float]:
        """Return what a unit takes, at most what some host has: such a unit says itself what is missing."""
        wanted = {MEMORY: min(rounded_memory(self.megabytes[unit.id]), self._most(MEMORY))}
        if unit.cards:
            wanted[CARDS] = min(unit.cards, self._most(CARDS))
        elif unit.stage == "compile" and is_real_card(self._runtime(unit.runtime)):
            wanted[COMPILER if self._most(COMPILER) else CARDS] = A_LITTLE
        return {name: amount for name, amount in wanted.items() if amount}

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        import ray

        ray.shutdown()


def rounded_memory(megabytes: float) -> float:
    """Return bytes for an estimate in 10^6 bytes: a power of two of 10^9, so that few kinds of actors are needed."""
    return 1e9 * 2.0 ** max(0, math.ceil(math.log2(max(megabytes, 1.0) / 1e3)))


def _check_reachable(address: str) -> None:
    """Raise ConfigError if nothing listens at ``HOST:PORT``, for which Ray would wait minutes, or if it is ``ray://``."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"--cluster {address}: Ray's client cannot stream what units tell. Call this on a host of the cluster, with"
            " --cluster auto, or give the address of the head that hosts join, such as head:6379"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"--cluster: nothing answers at {address!r}: {exc}; is that the address of the head?"
        ) from exc
