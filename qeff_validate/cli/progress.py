# SPDX-License-Identifier: Apache-2.0
"""What the commands print: the console, and the progress of a run on standard error."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qeff_validate.cli import signals
from qeff_validate.report.step_times import SHOWN_S, STEP_TIMES, StepTimes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LONG_S = 2.0
"""After so long a step has a line in a log although it has not ended."""

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


def print_wrapped(text: str, *, stderr: bool = False) -> None:
    """Print text as `print_text` does; on a terminal its lines end between words, and go on below a hanging indent.

    A word that is longer than a line, such as a path, stays whole, so that it can be copied.
    """
    terminal = console(stderr=stderr)
    if terminal.is_terminal:
        text = "\n".join(_wrapped(line, terminal.width) for line in text.split("\n"))
    print_text(text, stderr=stderr)


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        tabsize=1,
    )


class TerminalProgress:
    """Progress on standard error: a spinner with the elapsed time on a terminal, lines elsewhere.

    A step that takes `SHOWN_S` or more has a line when it ends. Where there is no terminal, one that takes `LONG_S` has
    a line by then too, so that a log tells what is running.

    Args:
        verbose: print the output of child processes, such as the compiler's, line by line; when each step starts; and
            what is taken from the store.
        quiet: print nothing.
        times: file in which durations are kept, so that the next run can tell how long a step takes; None: none.
    """

    def __init__(self, verbose: bool, *, quiet: bool = False, times: Path | None = None) -> None:
        self._console = console(stderr=True)
        self._console.file = sys.stderr  # this one, also while an exporter's output is redirected
        self._console.quiet = quiet
        self._verbose = verbose
        self._times = StepTimes(times)
        self._live: Progress | None = None
        self._overview = ""
        self._overview_task: TaskID | None = None

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show a step while it runs, and its duration if that is half a second or more."""
        start = time.perf_counter()
        about = self._times.estimate(text)
        try:
            with (
                self._spinner(text + about)
                if self._console.is_terminal and not self._verbose
                else self._lines(f"{text}: running{about}")
            ):
                yield
        finally:
            signals.raise_if_received()  # a library may have replaced the interruption by an exception of its own
        seconds = time.perf_counter() - start
        if seconds >= SHOWN_S:
            self._print(f"{text}: {seconds:.1f} s")
            self._times.keep(text, seconds)

    def line(self, text: str) -> None:
        """Print one line of a child process's output if verbose."""
        if self._verbose:
            self._print(f"  | {text}")

    def overview(self, text: str) -> None:
        """Show a line above the steps that run, on a terminal."""
        self._overview = text
        if self._live is not None and self._overview_task is not None:
            self._live.update(self._overview_task, description=text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _spinner(self, text: str) -> Iterator[None]:
        """Show a step with its elapsed time; a step within or beside another has a line below."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._live is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._live = Progress(*columns, console=self._console, transient=True)
            self._overview_task = self._live.add_task(self._overview, total=None) if self._overview else None
            self._live.start()
        live, task = self._live, self._live.add_task(text, total=None)
        try:
            yield
        finally:
            live.remove_task(task)
            if {one.id for one in live.tasks} <= {self._overview_task}:  # steps of several processes end in any order
                live.stop()
                self._live = None

    @contextmanager
    def _lines(self, text: str) -> Iterator[None]:
        """Print a line when a step has run for `LONG_S`; if verbose, at once."""
        if self._verbose:
            self._print(text)
            yield
            return
        timer = threading.Timer(LONG_S, self._print, (text,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def terminal_progress(store: str | None, verbose: bool, *, quiet: bool = False) -> TerminalProgress:
    """Return the progress of a command; durations are kept in the store.

    Args:
        store: directory or URL of the store; None: the default one.
        verbose: see `TerminalProgress`.
        quiet: print nothing.
    """
    from qeff_validate.builders.store import Store

    return TerminalProgress(verbose, quiet=quiet, times=Store(store).root / STEP_TIMES)
