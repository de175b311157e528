# SPDX-License-Identifier: Apache-2.0
"""The command line in forks of a process that has imported all frameworks: hundreds of runs in minutes.

Each run is a process in a session of its own, with its own exit code, signals and memory, as the console script is;
what it saves is the import of torch. `WarmCli` is the client, `WarmProcess` one run of it; as a script this file is the
server, which reads one JSON request a line from stdin and answers each with one line.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forked_children import SOCKET, fork_children
from processes import environ

TOKEN = "QEFF_VALIDATE_TEST_RUN"
"""Environment variable by which every process that a run has started is known."""

MOST_BYTES = 4 << 30
"""Of memory that a run may ask for; small cases take a tenth of it."""


PRELOADED = tuple(
    f"qeff_validate.{part}"
    for part in ("builders", "cli", "engine", "explain", "models", "mutation", "report", "runtimes")
)
"""What of this package is imported before the forks."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that ended, or was ended.

    Attributes:
        code: exit code; minus the number of the signal that killed it; None if it took longer than its limit.
        text: both output streams.
        seconds: how long it took.
        megabytes: the most memory that its process had at once.
    """

    code: int | None
    text: str
    seconds: float
    megabytes: float


class WarmCli:
    """A server process and the runs that it has forked; a context manager, which ends all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = uuid.uuid4().hex
        self._started: dict[int, tuple[Path, float]] = {}
        self._threads = {"OMP_NUM_THREADS": "1", "QAIC_SIM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **self._threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> WarmCli:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._started):
            self.wait(pid, limit=0)
        with self._server:
            assert self._server.stdin is not None
            self._server.stdin.close()

    def start(
        self,
        *arguments: str | Path,
        cwd: Path,
        variables: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> int:
        """Start a run, which may take `MOST_BYTES`, and return its process id.

        Args:
            arguments: of the command line.
            cwd: its working directory.
            variables: further ones of its environment.
            largest_file: bytes that a file may have (RLIMIT_FSIZE).
        """
        log = self.folder / f"log-{uuid.uuid4().hex}"
        variables = {**environ(self.folder), **self._threads, TOKEN: self.token, **(variables or {})}
        limits = {"RLIMIT_DATA": MOST_BYTES, "RLIMIT_FSIZE": largest_file}
        pid = self.fork(*arguments, cwd=cwd, variables=variables, out=log, err=log, limits=limits)
        self._started[pid] = (log, time.monotonic())
        return pid

    def fork(
        self,
        *arguments: str | Path,
        cwd: Path,
        variables: Mapping[str, str],
        out: Path,
        err: Path,
        limits: Mapping[str, int | None] | None = None,
        program: Literal["qeff-validate", "pytest"] = "qeff-validate",
    ) -> int:
        """Start a run and return its process id; whoever asks for it has to end it, by `end`.

        Args:
            arguments: of the command line.
            cwd: its working directory.
            variables: its environment.
            out: file of its standard output.
            err: file of its standard error; may be the same.
            limits: of resources, by their names in the module `resource`; None: none.
            program: what is run.
        """
        return int(
            self._ask(
                {
                    "do": "start",
                    "program": program,
                    "arguments": [str(part) for part in arguments],
                    "cwd": str(cwd),
                    "out": str(out),
                    "err": str(err),
                    "variables": dict(variables),
                    "limits": {name: value for name, value in (limits or {}).items() if value is not None},
                }
            )["pid"]
        )

    def end(self, pid: int, limit: float) -> dict[str, Any]:
        """Wait for a run and return its exit code and greatest memory; it is killed after a limit in seconds."""
        return self._ask({"do": "wait", "pid": pid, "limit": limit})

    def ended(self, pid: int, limit: float) -> bool:
        """Wait so many seconds for the end of a run; say whether it has come."""
        return bool(self._ask({"do": "poll", "pid": pid, "limit": limit})["ended"])

    def wait(self, pid: int, limit: float) -> Run:
        """Wait for the end of a run, and kill it with all its children if it takes longer than a limit in seconds."""
        log, start = self._started.pop(pid)
        reply = self.end(pid, limit)
        seconds = time.monotonic() - start
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        return Run(reply["code"], text, seconds, reply["kilobytes"] / 1024)

    def run(self, *arguments: str | Path, cwd: Path, limit: float = 120, **more: Any) -> Run:
        """Start a run and wait for its end."""
        return self.wait(self.start(*arguments, cwd=cwd, **more), limit)

    def children(self) -> list[int]:
        """Return the processes that runs have started and that are alive."""
        mark = f"{TOKEN}={self.token}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended, or is somebody else's
                continue
        return found

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        reply: dict[str, Any] = json.loads(self._server.stdout.readline())
        return reply


class WarmProcess:
    """A run as a process, with what tests use of `subprocess.Popen`.

    Args:
        cli: forks it.
        arguments: of the command line.
        cwd: its working directory.
        variables: its environment.
        err: file of its standard error; None: `communicate` returns it.
    """

    def __init__(
        self, cli: WarmCli, *arguments: str | Path, cwd: Path, variables: Mapping[str, str], err: Path | None = None
    ) -> None:
        self.args = ["qeff-validate", *map(str, arguments)]
        self.returncode: int | None = None
        self._cli, self._err = cli, err
        self._files = [cli.folder / f"{stream}-{uuid.uuid4().hex}" for stream in ("out", "err")]
        out, own = self._files
        (err or own).touch()  # a test may read along from now on
        self.pid = cli.fork(*arguments, cwd=cwd, variables=variables, out=out, err=err or own)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.wait() if self.returncode is None and self._cli.ended(self.pid, 0) else self.returncode

    def wait(self, timeout: float = 240) -> int | None:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it took longer than so many seconds, and was killed.
        """
        if self.returncode is None:
            code = self._cli.end(self.pid, timeout)["code"]
            self.returncode = -signal.SIGKILL if code is None else code
            if code is None:
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str | None]:
        """Wait for its end and return what it wrote to both streams."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in self._files)
        return out, err if self._err is None else None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended; until `wait` its process id is nobody else's."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _serve() -> int:
    from qeff_validate.cli import main, signals

    signals.exit_on_signals()  # so is the console script's first moment
    import onnx.reference.ops  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript.optimizer  # noqa: F401
    import peft  # noqa: F401
    import rich.markdown  # noqa: F401
    import torch.onnx._internal.exporter._compat  # noqa: F401  # what an export imports, 2 s of it
    import transformers.models.bert.modeling_bert  # noqa: F401

    import qeff_validate

    for module in pkgutil.walk_packages(qeff_validate.__path__, "qeff_validate."):
        if module.name.startswith(PRELOADED) and not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # an extra that is not installed
                __import__(module.name)
    gc.freeze()  # a collection in a fork would copy every page
    replies = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                replies.close()
                _prepare(request)
                _leave(_pytest() if request["program"] == "pytest" else main(request["arguments"]))
            reply: dict[str, Any] = {"pid": pid}
        elif request["do"] == "poll":
            reply = {"ended": _has_ended(request["pid"], request["limit"])}
        else:
            reply = _end(request["pid"], request["limit"])
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    return 0


def _prepare(request: Mapping[str, Any]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(request["variables"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for target, name in enumerate((os.devnull, request["out"], request["err"])):
        number = os.open(name, flags if target else os.O_RDONLY)
        os.dup2(number, target)
        os.close(number)
    os.chdir(request["cwd"])
    if SOCKET in os.environ:
        fork_children()
    sys.argv = [request["program"], *request["arguments"]]
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _pytest() -> int:
    """Run ``python -m pytest`` with the arguments of this process."""
    import pytest

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.path[0] = os.getcwd()
    return int(pytest.console_main())


def _leave(code: int) -> None:
    """End as an interpreter does, but do not take the frameworks apart, which takes seconds."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_ended(pid: int, limit: float) -> bool:
    number = os.pidfd_open(pid)
    try:
        return bool(select.select([number], [], [], limit)[0])
    finally:
        os.close(number)


def _end(pid: int, limit: float) -> dict[str, Any]:
    in_time = _has_ended(pid, limit)
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status) if in_time else None, "kilobytes": usage.ru_maxrss}


if __name__ == "__main__":
    sys.exit(_serve())
