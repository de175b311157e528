# SPDX-License-Identifier: Apache-2.0
"""A runtime in a process of its own, so that native code that crashes or hangs is an error and not the end of a run."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from qeff_validate import errors
from qeff_validate.artifact import Artifact
from qeff_validate.errors import RunError
from qeff_validate.protocols import Runtime, Session, Settings
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.sdk.processes import ending, kill
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec, check_feeds

LOG = logging.getLogger(__name__)

OPEN_SECONDS = 600
"""For opening and for closing: reading tens of gigabytes, and a driver that is slow to let go."""

START_SECONDS = 20
"""How much longer than a run opening may take, if that is less: the process has to start and import first."""

GRACE_SECONDS = 10
"""How long a process whose work is done, or in vain, may take to release its card and end."""

TAIL_LINES, TAIL_BYTES = 20, 8192
"""How much of what the process printed an error shows."""

LOG_BYTES = 1 << 20
"""How much of what the process printed is kept, save during one request."""

WORKER = "qeff_validate.runtimes.isolation.worker"
"""The module that a child process runs."""


class Isolated:
    """Opens QPCs and untrusted artifacts in a child process; all else is asked of the adapter itself.

    Args:
        adapter: the runtime, made here; it opens what this library exported itself.
        name: the name of its entry point, by which the child makes its own.
        settings: what both are made with.
    """

    def __init__(self, adapter: Runtime, name: str, settings: Settings) -> None:
        self._adapter, self._entry, self._settings = adapter, name, settings
        self.name, self.kind = adapter.name, adapter.kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def probe(self) -> str | None:
        """Return what the adapter says."""
        return self._adapter.probe()

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open an artifact, as a rule in a new process, which is gone when the context ends.

        What this library exported itself holds nothing that could hang, and stays in this process.

        Raises:
            RunError: the process died, or did not answer in time and was killed.
            ValidateError: what the adapter raised there.
        """
        if artifact.kind != "qpc" and not artifact.untrusted:
            with self._adapter.open(artifact) as session:
                yield session
            return
        request = {
            "runtime": self._entry,
            "settings": asdict(self._settings),
            "artifact": {
                "kind": artifact.kind,
                "path": str(artifact.path),
                "digest": artifact.digest,
                "provenance": artifact.provenance,
                "buckets": [dict(bucket) for bucket in artifact.buckets],
            },
        }
        limit = min(OPEN_SECONDS, self._settings.run_timeout_s + START_SECONDS)
        with _child(self.name, card=artifact.kind == "qpc") as child:
            described, _ = child.ask(f"while opening {artifact.path}", request, limit=limit)
            yield IsolatedSession(child, described, str(artifact.path), self._settings.run_timeout_s)
            child.ask(f"while closing {artifact.path}", {"do": "close"}, limit=OPEN_SECONDS)


class IsolatedSession:
    """A session whose other end is in the child; retained state lives there."""

    def __init__(self, child: Child, described: dict[str, Any], path: str, limit: float) -> None:
        self._child, self._path, self._limit = child, path, limit
        self.inputs: tuple[TensorSpec, ...] = _specs(described["inputs"])
        self.outputs: tuple[TensorSpec, ...] = _specs(described["outputs"])
        self.shapes: tuple[Shapes, ...] = tuple(
            {name: tuple(dims) for name, dims in shapes.items()} for shapes in described["shapes"]
        )
        self.simulated = bool(described["simulated"])
        self._runs = 0

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once in the child.

        Raises:
            RunError: as in the adapter; or the process died, or took longer than the limit and was killed.
        """
        # only what is wrong with the arrays themselves; what may be left out, the session in the child knows
        check_feeds(feeds, self.inputs, optional=[spec.name for spec in self.inputs])
        self._runs += 1
        request = {"do": "run", "fetch": None if fetch is None else list(fetch)}
        _, found = self._child.ask(f"in run {self._runs} of {self._path}", request, feeds, limit=self._limit)
        return found

    def reset(self) -> None:
        """Forget retained state."""
        self._child.ask(f"in a reset of {self._path}", {"do": "reset"}, limit=self._limit)


class Child:
    """A process that answers, and what it prints."""

    def __init__(self, name: str, *, card: bool) -> None:
        self._name, self._card = name, card
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed by leave)
        self._asked_at = 0
        ours, theirs = socket.socketpair()
        self._end, self._channel = ours, Channel(ours)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "qeff_validate.runtimes.isolation.worker",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def ask(
        self, doing: str, request: dict[str, Any], arrays: Tensors | None = None, *, limit: float
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send a request and return the reply.

        Args:
            doing: when an error happened, for its text.
            request: plain data.
            arrays: what goes with it.
            limit: seconds without a sign of life after which the process is killed.
        """
        if self._end.fileno() < 0:
            raise RunError("this session is closed")
        self._end.settimeout(limit)
        self._mark()
        try:
            self._channel.send(request, arrays)
            reply, found = self._channel.receive()
            while "note" in reply:
                LOG.warning("%s: %s", self._name, reply["note"])
                reply, found = self._channel.receive()
        except TimeoutError as exc:
            kill(self.process)
            hint = (
                "qaic-util -q shows the card's state, qaic-util -s resets it"
                if self._card
                else "does the graph hold a Loop that never ends?"
            )
            raise RunError(
                f"{self._name} did not answer for {limit:g} s {doing}, so its process was killed: {hint};"
                f" --run-timeout is the limit of a run{self._said(self._asked_at)}"
            ) from exc
        except Closed as exc:
            raise RunError(self._died(doing)) from exc
        if "error" in reply:
            raise getattr(errors, reply["error"])(f"{reply['text']}{self._said(self._asked_at)}")
        return reply, found

    def leave(self, grace: float) -> None:
        """Hang up, so that the process releases what it holds and ends, and kill it if it does not."""
        self._channel.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        finally:
            if self.process.poll() is None:
                kill(self.process)
            self._printed.close()

    def _died(self, doing: str) -> str:
        try:
            code = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            kill(self.process)
            code = self.process.returncode
        hints = ["native code of the runtime failed"]
        hints += ["the kernel log tells whether memory ran out"] if code == -9 else []
        hints += ["qaic-util -q shows the card's state"] if self._card and code != -9 else []
        return (
            f"the process of {self._name} {ending(code)} {doing}: {'; '.join(hints)}, and"
            f" running the case again tells whether it comes back{self._said(0)}"
        )

    def _mark(self) -> None:
        """Note where the output of the next request begins; drop what came before if it is much."""
        number = self._printed.fileno()
        self._asked_at = os.fstat(number).st_size
        if self._asked_at > LOG_BYTES:
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)  # the child writes where we stand: the position is shared
            self._asked_at = 0

    def _said(self, start: int) -> str:
        """Return the last lines that the process printed, from a place on; the runtime's own log is among them."""
        number = self._printed.fileno()
        start = max(start, os.fstat(number).st_size - TAIL_BYTES)
        lines = os.pread(number, TAIL_BYTES, start).decode(errors="replace").splitlines()
        shown = [f"  | {line}" for line in lines if line.strip()][-TAIL_LINES:]
        return "\n".join(["\n  its process printed:", *shown]) if shown else ""


@contextmanager
def _child(name: str, *, card: bool) -> Iterator[Child]:
    child = Child(name, card=card)
    grace = 0.0  # an interruption waits for nothing
    try:
        yield child
        grace = GRACE_SECONDS
    except Exception:
        grace = GRACE_SECONDS
        raise
    finally:
        child.leave(grace)


def _environment() -> dict[str, str]:
    """Let the child import what we import, and nothing that lies in its working directory by chance."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _specs(listed: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in listed)
