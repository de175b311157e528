# SPDX-License-Identifier: Apache-2.0
"""The simulated SDK's processes as forks of one that has imported numpy, onnx and ONNX Runtime already.

A compilation and a run on the simulated card are a process each, most of whose time in a test is spent on imports.
`fork_children` gives the library a `subprocess` whose `Popen` forks them instead, each with a session, an environment,
output and an exit code of its own; it dies with the process that asked for it. Tests of processes themselves start
real ones (`conftest.REAL_PROCESSES`). As a script this file is the server, which forks for all processes of a test.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qeff_validate.sdk.processes import die_with_parent

SOCKET = "QEFF_VALIDATE_TEST_FORKS"
"""Environment variable with the path of the server's socket; where it is missing, processes are real ones."""

THREADS = "OMP_NUM_THREADS"
"""The one variable that is read at import: a process with another value than the server's is a real one."""

WORKER, COMPILER = "qeff_validate.runtimes.isolation.worker", "qeff_validate.sdk.simulated.compiler"
"""The modules that are run as forks."""

STARTED_IN = ("qeff_validate.runtimes.isolation.parent", "qeff_validate.sdk.processes")
"""The modules of the library that start them."""

FREE = 100
"""A file descriptor that nobody has, nor any above it."""

MOST_BYTES = 1 << 18
"""Of a request; it holds an environment."""


class ForkServer:
    """The process that forks; it ends with this one.

    Args:
        folder: an existing directory for its socket.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "forks"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.path))
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[listener.fileno()],
            )

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class ForkedProcess:
    """A forked process, with what the library uses of `subprocess.Popen`."""

    def __init__(self, connection: Connection, pid: int, stdout: Any) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._connection, self._handle = connection, os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it takes longer than so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            os.close(self._handle)
            self.returncode = self._connection.ask({"do": "reap", "pid": self.pid})
        return self.returncode


class Connection:
    """A client of the server."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        self._socket.connect(path)

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> int:
        """Send a request, and return the number that it is answered with."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        return int(self._socket.recv(64))

    def fork(
        self,
        module: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        output: Any,
        descriptors: Sequence[int],
    ) -> ForkedProcess:
        """Run a module as a script in a fork.

        Args:
            module: `WORKER` or `COMPILER`.
            arguments: of its command line.
            environ: its environment.
            output: takes both output streams: a file or `subprocess.PIPE`.
            descriptors: further ones that it has under the same numbers.
        """
        reader, writer = os.pipe() if output == subprocess.PIPE else (None, os.dup(output.fileno()))
        request = {
            "do": "fork", "module": module, "arguments": list(arguments), "environ": dict(environ), "cwd": os.getcwd(),
            "client": os.getpid(), "numbers": list(descriptors),
        }  # fmt: skip
        pid = self.ask(request, [writer, *descriptors])
        os.close(writer)
        return ForkedProcess(self, pid, None if reader is None else open(reader, errors="replace"))


@functools.cache
def _connection(path: str, _process: int) -> Connection:
    return Connection(path)  # one for each process: its forks do not share it


def popen(command: Sequence[str], **options: Any) -> Any:
    """Start a process as `subprocess.Popen` does, or fork it if it is one of the simulated SDK's."""
    path = os.environ.get(SOCKET)
    if path and list(command[:2]) == [sys.executable, "-m"] and command[2] in (WORKER, COMPILER):
        environ = {**os.environ, **(options.get("env") or {})}
        if environ.get(THREADS) == "1":
            connection = _connection(path, os.getpid())
            return connection.fork(command[2], command[3:], environ, options["stdout"], options.get("pass_fds", ()))
    return subprocess.Popen(command, **options)


class _Subprocess(types.ModuleType):
    Popen = staticmethod(popen)

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def fork_children() -> None:
    """Let the library fork the simulated SDK's processes wherever `SOCKET` is set."""
    for name in STARTED_IN:
        __import__(name)
        sys.modules[name].subprocess = _Subprocess("subprocess")  # type: ignore[attr-defined]


def _serve(listener: socket.socket) -> None:
    die_with_parent()
    import onnx.reference.ops  # noqa: F401  # it folds constants

    import qeff_validate.runtimes.ort
    import qeff_validate.runtimes.qaic
    import qeff_validate.sdk.simulated.bindings.QAicApi_pb2
    import qeff_validate.sdk.simulated.bindings.qaicrt  # noqa: F401
    from qeff_validate.runtimes.isolation import worker
    from qeff_validate.sdk.simulated.compiler import qaic_compile

    mains: Mapping[str, Callable[[Sequence[str]], int]] = {WORKER: worker.main, COMPILER: qaic_compile.main}
    gc.freeze()  # a collection in a fork would copy every page
    running: dict[socket.socket, set[int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    running[client] = set()
                    selector.register(client, selectors.EVENT_READ)
                elif not _answer(key.fileobj, running[key.fileobj], mains):
                    selector.unregister(key.fileobj)
                    _end(running.pop(key.fileobj))
                    key.fileobj.close()


def _answer(client: Any, running: set[int], mains: Mapping[str, Callable[[Sequence[str]], int]]) -> bool:
    """Answer a request of a client; return False if there is none, because the client is gone."""
    try:
        data, descriptors, _, _ = socket.recv_fds(client, MOST_BYTES, 16)
    except ConnectionResetError:
        return False
    if not data:
        return False
    request = json.loads(data)
    if request["do"] == "reap":
        reply = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        running.remove(request["pid"])
    else:
        reply = os.fork()
        if reply == 0:
            os._exit(_run(request, descriptors, mains[request["module"]]))
        running.add(reply)
        for each in descriptors:
            os.close(each)
    with contextlib.suppress(BrokenPipeError):
        client.send(str(reply).encode())
    return True


def _end(running: set[int]) -> None:
    """Kill the processes of a client that is gone, each with its group."""
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _run(request: Mapping[str, Any], descriptors: Sequence[int], main: Callable[[Sequence[str]], int]) -> int:
    """Be the process that was asked for, and return its exit code."""
    try:
        os.setsid()
        die_with_parent()
        os.environ.clear()
        os.environ.update(request["environ"])
        os.chdir(request["cwd"])
        if "PYTHONPATH" in request["environ"]:
            sys.path[:] = request["environ"]["PYTHONPATH"].split(os.pathsep)
        nothing = os.open(os.devnull, os.O_RDONLY)
        output, *others = (fcntl.fcntl(each, fcntl.F_DUPFD, FREE) for each in descriptors)
        for source, target in ((nothing, 0), (output, 1), (output, 2), *zip(others, request["numbers"], strict=True)):
            os.dup2(source, target)
        os.getppid = lambda: request["client"]
        sys.argv = [request["module"], *request["arguments"]]
        return main(sys.argv[1:])
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(bool(exc.code))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
