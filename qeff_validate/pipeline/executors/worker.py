# SPDX-License-Identifier: Apache-2.0
"""A process that does one unit after the other for `local_processes.LocalProcesses`.

python -m qeff_validate.pipeline.executors.worker SOCKET PARENT
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from qeff_validate.builders.shared_store import FULL
from qeff_validate.config.case import Case
from qeff_validate.errors import Unavailable
from qeff_validate.memory import end_without_collection
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.executors.units import JUDGES, Unit
from qeff_validate.pipeline.machine import reset_resident_peak, resident_peak_mb
from qeff_validate.pipeline.runner import Runner
from qeff_validate.prechecks.graph_precision import measurable
from qeff_validate.protocols import Runtime, Settings, capabilities
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.sdk.processes import bound_to_parent


class ForwardedProgress:
    """Progress that the parent shows.

    Args:
        send: sends a message to the parent.
    """

    def __init__(self, send: Callable[[Mapping[str, Any]], object]) -> None:
        self._send, self._count = send, 0

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Enclose one long step."""
        self._count += 1
        number = self._count
        self._send({"begin": text, "step": number})
        try:
            yield
        finally:
            self._send({"end": number})

    def line(self, text: str) -> None:
        """Forward one line of a child's output."""
        self._send({"line": text})


class UnitServer:
    """Does one unit after the other, and keeps the case loaded.

    Args:
        job: cases, settings, store and whether to explain, as `worker_pool.WorkerPool` sends them.
        send: sends a message to the parent.
    """

    def __init__(self, job: Mapping[str, Any], send: Callable[[Mapping[str, Any]], object]) -> None:
        settings = Settings.from_plain(job["settings"])
        self._runner = Runner(store=job["store"], settings=settings, progress=ForwardedProgress(send))
        self._cases = {plain["name"]: Case.model_validate(plain) for plain in job["cases"]}
        self._explain, self._send = job["explain"], send

    def do(self, request: Mapping[str, Any]) -> None:
        """Do a unit; the last message that is sent says that it is done."""
        unit, runner = Unit(**{**request["unit"], "needs": ()}), self._runner
        case = self._cases[unit.case]
        reset_resident_peak()
        start, result, failure, hits = time.perf_counter(), None, "", runner.store.hits
        if request["device_ids"]:
            runner.use_cards(request["device_ids"])
        if unit.stage == JUDGES:
            made = runner.result(case, unit.runtime, self._explain)
            result, failure = made.plain(), made.reason if made.status == "error" else ""
        else:
            try:
                prepare(runner.pipeline(case), unit, [runner.runtime(name) for name in request["runtimes"]])
            except Exception as exc:  # whoever needs what could not be made meets the error again, and tells it
                failure = str(exc) or type(exc).__name__
        fault = host_fault(runner, unit, request["device_ids"], failure) if failure else None
        done = {"result": result, "fault": fault, "seconds": time.perf_counter() - start, "host": ""}
        done["hits"] = runner.store.hits - hits
        self._send({**done, "megabytes": resident_peak_mb()})


def host_fault(runner: Runner, unit: Unit, cards: Sequence[int], failure: str) -> Mapping[str, Any] | None:
    """Return why a unit failed that might not fail elsewhere, as ``reason`` and ``cards``; None: nothing is known.

    Args:
        runner: has done it.
        unit: has failed.
        cards: ids of those that it had.
        failure: what it said, or what a process that it called said.
    """
    full = next((text for text in map(os.strerror, FULL) if text in failure), None)
    if full is not None:
        return {"reason": f"had no room ({full})", "cards": []}
    sdk = capabilities(runner.runtime(unit.runtime)).sdk if cards else None
    if sdk is None:
        return None
    try:
        ready = {card.qid for card in sdk.ready()}
    except Unavailable as exc:
        return {"reason": f"had no card ({exc})", "cards": [*cards]}
    broken = [card for card in cards if card not in ready]
    names = ", ".join(map(str, broken))
    return {"reason": f"had a card that is not Ready any more ({names})", "cards": broken} if broken else None


def serve(channel: Channel) -> None:
    """Do the units that arrive.

    Raises:
        Closed: the parent has closed its end or ended.
    """
    server = UnitServer(channel.receive()[0], channel.send)
    while True:
        server.do(channel.receive()[0])


def prepare(pipeline: Pipeline, unit: Unit, runtimes: Sequence[Runtime]) -> None:
    """Make what a unit's stage leaves in the store.

    Args:
        pipeline: of its case.
        unit: any stage but ``run``.
        runtimes: on which the case runs; for ``compile`` the one it is compiled for.

    Raises:
        ValidateError: it cannot be made.
    """
    if unit.stage == "reference":
        pipeline.reference()
    elif unit.stage == "export":
        pipeline.onnx()
    elif unit.stage == "compile":
        (runtime,) = runtimes
        pipeline.qpc(capabilities(runtime).sdk)
    else:
        for precision in dict.fromkeys(pipeline.precision(runtime).profile for runtime in runtimes):
            found = next(item for item in map(pipeline.precision, runtimes) if item.profile == precision)
            if measurable(found):
                pipeline.floor(found)
        pipeline.ceiling()


def main(arguments: Sequence[str]) -> int:
    """Serve one parent until it closes its end of the socket or ends."""
    number, parent = map(int, arguments)
    if not bound_to_parent(parent):
        return 1
    end_without_collection()

    def leave(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)  # what is half-made is removed on the way out

    signal.signal(signal.SIGTERM, leave)
    with suppress(Closed):
        serve(Channel(socket.socket(fileno=number)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
