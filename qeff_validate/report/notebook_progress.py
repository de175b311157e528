# SPDX-License-Identifier: Apache-2.0
"""Progress of a run in a notebook: the step that runs, below the cell."""

from __future__ import annotations

import html
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qeff_validate.report.step_times import SHOWN_S, StepTimes

PERIOD_S = 1.0
"""How often the elapsed time is shown anew."""


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookProgress:
    """A line with the steps that run, their elapsed time and how long they took last time; empty when none runs.

    Args:
        show: takes the line as HTML, in place of the one before.
        times: file in which durations are kept; None: none.
    """

    def __init__(self, show: Callable[[str], object], times: Path | None = None) -> None:
        self._show, self._times = show, StepTimes(times)
        self._running: list[tuple[str, float]] = []

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show a step while it runs."""
        start = time.perf_counter()
        self._running.append((f"{text}{self._times.estimate(text)}", start))
        ended = threading.Event()
        ticks = threading.Thread(target=self._tick, args=(ended,), daemon=True)
        self._refresh()
        ticks.start()
        try:
            yield
        finally:
            ended.set()
            ticks.join()
            self._running.pop()
            self._refresh()
        seconds = time.perf_counter() - start
        if seconds >= SHOWN_S:
            self._times.keep(text, seconds)

    def line(self, text: str) -> None:
        """Ignore a line of a child process's output."""

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(PERIOD_S):
            self._refresh()

    def _refresh(self) -> None:
        now = time.perf_counter()
        lines = [f"{text} · {now - start:.0f} s" for text, start in self._running]
        self._show("".join(f'<div style="opacity:.7">{html.escape(line)}</div>' for line in lines))


def notebook_progress(times: Path) -> NotebookProgress:
    """Return the progress of a run in this notebook.

    Args:
        times: file in which durations are kept.
    """
    from IPython.display import HTML, display

    with suppress(ImportError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # transformers imports it; this line needs no widgets
        import tqdm.auto  # noqa: F401
    line = display(HTML(""), display_id=True)
    return NotebookProgress(lambda text: line.update(HTML(text)), times)
