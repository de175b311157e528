# SPDX-License-Identifier: Apache-2.0
"""A runtime in a child process: native code that crashes or hangs becomes an error and does not end the run."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from qeff_validate import errors
from qeff_validate.artifact import Artifact
from qeff_validate.errors import RunError
from qeff_validate.protocols import Capabilities, Runtime, Session, Settings, capabilities
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.sdk.processes import ending, kill, wait_or_kill
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec, check_feeds

LOG = logging.getLogger(__name__)

OPEN_SECONDS = 600
"""Time limit of opening and of closing: reading tens of gigabytes, and drivers that release a card slowly."""

START_SECONDS = 20
"""How much longer than a run opening may take, if that is less than `OPEN_SECONDS`: the process starts and imports."""

GRACE_SECONDS = 10
"""Time limit for the child to release its card and end, after its work or after an error."""

TAIL_LINES, TAIL_BYTES = 20, 8192
"""How much of the child's output an error message contains."""

LOG_BYTES = 1 << 20
"""Size of the child's output above which it is discarded between requests."""

WORKER = "qeff_validate.runtimes.isolation.worker"
"""The module that the child process runs."""


class IsolatedRuntime:
    """A runtime that opens QPCs and untrusted artifacts in a child process, and other artifacts in this process.

    Args:
        runtime: opens what this library exported; it also answers for `probe` and `capabilities`.
        name: of its entry point, from which the child creates its own instance.
        settings: of both instances.
        shared: a child process that opens ONNX files for several such runtimes; None: each artifact gets its own.
    """

    def __init__(self, runtime: Runtime, name: str, settings: Settings, shared: SharedChild | None = None) -> None:
        self._runtime, self._entry, self._settings, self._shared = runtime, name, settings, shared
        self.name, self.kind = runtime.name, runtime.kind

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the runtime."""
        return capabilities(self._runtime)

    def probe(self) -> str | None:
        """Return None if the runtime is usable, else the reason and a remedy."""
        return self._runtime.probe()

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open an artifact; the child process ends with the context.

        An ONNX file or module that this library exported contains no code that could hang, and is opened in this
        process.

        Raises:
            RunError: the child process crashed, or exceeded the time limit and was killed.
            ValidateError: any error of the runtime in the child process.
        """
        if artifact.kind != "qpc" and not artifact.untrusted:
            with self._runtime.open(artifact) as session:
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
        with self._child(card=artifact.kind == "qpc") as child:
            description, _ = child.request(f"while opening {artifact.path}", request, limit=limit)
            yield IsolatedSession(child, description, str(artifact.path), self._settings.run_timeout_s)
            child.request(f"while closing {artifact.path}", {"do": "close"}, limit=OPEN_SECONDS)

    def _child(self, *, card: bool) -> AbstractContextManager[Child]:
        if card or self._shared is None:
            return _child(self.name, card=card)
        return self._shared.borrowed(self.name)


class IsolatedSession:
    """A session that runs in the child process; retained state stays there.

    Args:
        child: has opened the artifact.
        description: inputs, outputs and shapes, as `worker` sends them.
        path: of the artifact, for error messages.
        limit: time limit of a run in seconds.
    """

    def __init__(self, child: Child, description: dict[str, Any], path: str, limit: float) -> None:
        self._child, self._path, self._limit = child, path, limit
        self.inputs: tuple[TensorSpec, ...] = _specs(description["inputs"])
        self.outputs: tuple[TensorSpec, ...] = _specs(description["outputs"])
        self.shapes: tuple[Shapes, ...] = tuple(
            {name: tuple(dims) for name, dims in shapes.items()} for shapes in description["shapes"]
        )
        self._runs = 0

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once in the child process.

        Raises:
            RunError: the runtime failed, or the child process crashed, or exceeded the time limit and was killed.
        """
        # checks the arrays that are there; the session in the child knows which of them may be left out
        check_feeds(feeds, self.inputs, optional=[spec.name for spec in self.inputs])
        self._runs += 1
        request = {"do": "run", "fetch": None if fetch is None else list(fetch)}
        _, outputs = self._child.request(f"in run {self._runs} of {self._path}", request, feeds, limit=self._limit)
        return outputs

    def reset(self) -> None:
        """Forget retained state."""
        self._child.request(f"in a reset of {self._path}", {"do": "reset"}, limit=self._limit)


class Child:
    """A child process with a channel for requests and a file for its output.

    Args:
        name: of the runtime, for error messages.
        card: the runtime uses a card, so error messages mention ``qaic-util``.
    """

    def __init__(self, name: str, *, card: bool) -> None:
        self.name, self._card = name, card
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._request_offset = 0
        parent_end, child_end = socket.socketpair()
        self._socket, self._channel = parent_end, Channel(parent_end)
        with child_end:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    WORKER,
                    str(child_end.fileno()),
                    str(os.getpid()),
                ],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[child_end.fileno()],
                start_new_session=True,
            )

    def request(
        self, phase: str, request: dict[str, Any], arrays: Tensors | None = None, *, limit: float
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send a request and return the reply: JSON data and arrays.

        Args:
            phase: for error messages, such as ``in run 3 of PATH``.
            request: JSON data.
            arrays: the feeds.
            limit: seconds without a message after which the process is killed.

        Raises:
            RunError: the process crashed, or exceeded the limit and was killed.
            ValidateError: the error in the reply.
        """
        if self._socket.fileno() < 0:
            raise RunError("this session is closed")
        self._socket.settimeout(limit)
        self._mark_output()
        try:
            self._channel.send(request, arrays)
            reply, outputs = self._channel.receive()
            while "note" in reply:
                LOG.warning("%s: %s", self.name, reply["note"])
                reply, outputs = self._channel.receive()
        except TimeoutError as exc:
            kill(self.process)
            hint = (
                "qaic-util -q shows the card's state, qaic-util -s resets it"
                if self._card
                else "does the graph hold a Loop that never ends?"
            )
            raise RunError(
                f"{self.name} did not answer for {limit:g} s {phase}, so its process was killed: {hint};"
                f" --run-timeout is the limit of a run{self._output_tail(self._request_offset)}"
            ) from exc
        except Closed as exc:
            raise RunError(self._crash_report(phase)) from exc
        if "error" in reply:
            raise getattr(errors, reply["error"])(f"{reply['text']}{self._output_tail(self._request_offset)}")
        return reply, outputs

    def end(self, grace: float) -> None:
        """Close the channel, so that the process releases its artifact and ends, and kill it if it does not.

        Args:
            grace: seconds to wait.
        """
        self._channel.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        finally:
            if self.process.poll() is None:
                kill(self.process)
            self._output.close()

    def _crash_report(self, phase: str) -> str:
        code = wait_or_kill(self.process, GRACE_SECONDS)
        hints = ["native code of the runtime failed"]
        hints += ["the kernel log tells whether memory ran out"] if code == -9 else []
        hints += ["qaic-util -q shows the card's state"] if self._card and code != -9 else []
        return (
            f"the process of {self.name} {ending(code)} {phase}: {'; '.join(hints)}, and"
            f" running the case again tells whether it comes back{self._output_tail(0)}"
        )

    def _mark_output(self) -> None:
        """Record where the output of the next request begins, and discard earlier output above `LOG_BYTES`."""
        number = self._output.fileno()
        self._request_offset = os.fstat(number).st_size
        if self._request_offset > LOG_BYTES:
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)  # parent and child share the file position
            self._request_offset = 0

    def _output_tail(self, start: int) -> str:
        """Return the last lines of the child's output after an offset; the runtime's own log is among them."""
        number = self._output.fileno()
        start = max(start, os.fstat(number).st_size - TAIL_BYTES)
        lines = os.pread(number, TAIL_BYTES, start).decode(errors="replace").splitlines()
        tail = [f"  | {line}" for line in lines if line.strip()][-TAIL_LINES:]
        return "\n".join(["\n  its process printed:", *tail]) if tail else ""


@contextmanager
def _child(name: str, *, card: bool) -> Iterator[Child]:
    child = Child(name, card=card)
    grace = 0.0  # after an interruption, do not wait
    try:
        yield child
        grace = GRACE_SECONDS
    except Exception:
        grace = GRACE_SECONDS
        raise
    finally:
        child.end(grace)


class SharedChild:
    """A child process for ONNX files that are opened one after another, which ends with the context.

    It starts with the first file. An error in it ends it, and a file that is opened beside another has its own.
    """

    def __init__(self) -> None:
        self._child: Child | None = None
        self._free = True

    def __enter__(self) -> SharedChild:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end(GRACE_SECONDS)

    @contextmanager
    def borrowed(self, name: str) -> Iterator[Child]:
        """Yield the process for one file.

        Args:
            name: of the runtime, for error messages.
        """
        if not self._free:
            with _child(name, card=False) as child:
                yield child
            return
        if self._child is None:
            self._child = Child(name, card=False)
        self._child.name, self._free = name, False
        try:
            yield self._child
        except BaseException:
            self._end()
            raise
        finally:
            self._free = True


def child_environment() -> dict[str, str]:
    """Return an environment in which the child imports the same modules, and none from its working directory."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _specs(listed: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in listed)
