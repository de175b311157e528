# SPDX-License-Identifier: Apache-2.0
"""What the commands print: the console, and the progress of a run on standard error."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from qeff_validate.cli import signals

if TYPE_CHECKING:
    from rich.console import Console


Color = Literal["auto", "always", "never"]


def set_color(color: Color) -> None:
    """Set the colour of all output of this process, as the environment variables of rich do."""
    names = {"always": "FORCE_COLOR", "never": "NO_COLOR"}
    if color in names:
        for name in names.values():
            os.environ.pop(name, None)
        os.environ[names[color]] = "1"


def console(*, stderr: bool = False, least: int = 0) -> Console:
    """Return a rich console on standard output or standard error, at least so many columns wide."""
    from rich.console import Console

    terminal = Console(stderr=stderr)
    if not terminal.is_terminal:
        return Console(stderr=stderr, width=200)  # a pipe has no width: do not wrap lines to rich's default of 80
    return terminal if terminal.width >= least else Console(stderr=stderr, width=least)


def print_text(text: str, *, stderr: bool = False) -> None:
    """Print text as it is: no markup, no highlighting, no wrapping."""
    console(stderr=stderr).print(text, markup=False, highlight=False, soft_wrap=True)


class TerminalProgress:
    """Progress on standard error: a spinner on a terminal, one line per step elsewhere.

    Args:
        verbose: print the output of child processes, such as the compiler's, line by line.
        quiet: print nothing.
    """

    def __init__(self, verbose: bool, *, quiet: bool = False) -> None:
        self._console = console(stderr=True)
        self._console.quiet = quiet
        self._verbose = verbose

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show a step while it runs, and its duration if that is half a second or more."""
        start = time.perf_counter()
        try:
            with self._console.status(text) if self._console.is_terminal and not self._verbose else nullcontext():
                yield
        finally:
            signals.raise_if_received()  # a library may have replaced the interruption by an exception of its own
        seconds = time.perf_counter() - start
        if seconds >= 0.5:
            self._console.print(f"{text}: {seconds:.1f} s", markup=False, highlight=False)

    def line(self, text: str) -> None:
        """Print one line of a child process's output if verbose."""
        if self._verbose:
            self._console.print(f"  | {text}", markup=False, highlight=False)
