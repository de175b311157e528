# SPDX-License-Identifier: Apache-2.0
"""Child processes: they run in a process group of their own and never outlive the process that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process as soon as its parent dies (prctl(2)); without effect outside Linux."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def bound_to_parent(parent: int) -> bool:
    """Die with the parent from now on; return False if it has died already, so that nobody wants this process.

    Args:
        parent: its process id, as the parent gave it.
    """
    die_with_parent()
    return os.getppid() == parent


def wait_or_kill(child: subprocess.Popen[Any], seconds: float) -> int:
    """Wait for the end of a child and return its exit code; after so many seconds it is killed, with its group."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(child)
        return child.returncode


def kill(child: subprocess.Popen[Any]) -> None:
    """Kill a child and every other process of its process group, and wait for the child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def ending(code: int) -> str:
    """Describe how a process ended.

    Args:
        code: `subprocess.Popen.returncode`; negative: the signal that killed the process.

    Examples:
        >>> ending(3), ending(-9)
        ('ended with exit code 3', 'was killed by SIGKILL')
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-code}"


def run_process(
    command: Sequence[str], *, timeout_s: float, on_line: Callable[[str], None] | None = None
) -> tuple[int | None, list[str]]:
    """Run a command to its end.

    Args:
        command: program and arguments.
        timeout_s: seconds after which the process and its children are killed.
        on_line: called with each line of output as it is printed.

    Returns:
        The exit code (None: killed at the time limit) and the lines of both output streams, in order.

    Raises:
        OSError: the program cannot be started.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 (one system call, no lock)
    )
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(child, lines, on_line), daemon=True)
    reader.start()
    code = None
    try:
        code = child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(child)
    except BaseException:
        kill(child)
        raise
    finally:
        reader.join(timeout=5)
    return code, lines


def _read(child: subprocess.Popen[str], lines: list[str], on_line: Callable[[str], None] | None) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if on_line is not None:
                on_line(lines[-1])
