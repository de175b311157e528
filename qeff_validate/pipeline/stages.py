# SPDX-License-Identifier: Apache-2.0
"""Stages of a case: each runs once, what failed stays failed, and long ones are shown while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

from qeff_validate.errors import ValidateError, naming_extras

T = TypeVar("T")


class Progress(Protocol):
    """Is told what is going on; the default says nothing."""

    def step(self, text: str) -> AbstractContextManager[None]:
        """Enclose one long step."""

    def line(self, text: str) -> None:
        """Take one line of a child's output."""


@runtime_checkable
class OverviewProgress(Progress, Protocol):
    """Progress that also shows how far a whole run is."""

    def overview(self, text: str) -> None:
        """Show a line instead of the last one."""


class Silent:
    """Says nothing."""

    def step(self, text: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Ignore the step."""
        return nullcontext()

    def line(self, text: str) -> None:
        """Ignore the line."""


class NumberedProgress:
    """Puts before each step which of how many results is being made, such as ``[2/9]``.

    Args:
        progress: shows the steps.
        count: the number of results; a single one is not numbered.
    """

    def __init__(self, progress: Progress, count: int) -> None:
        self._progress, self._count = progress, count
        self.number = 1

    def step(self, text: str) -> AbstractContextManager[None]:
        """Enclose one long step."""
        return self._progress.step(f"[{self.number}/{self._count}] {text}" if self._count > 1 else text)

    def line(self, text: str) -> None:
        """Take one line of a child's output."""
        self._progress.line(text)


class Stages:
    """Results of the stages of one case by key.

    Args:
        case: its name, which begins each line of progress.
        progress: shows the long ones.
    """

    def __init__(self, case: str, progress: Progress) -> None:
        self._case, self._progress = case, progress
        self._results: dict[str, Any] = {}

    def once(self, key: str, run: Callable[[], T], label: str = "", *, shown: bool = False) -> T:
        """Return the result of a stage; it runs at the first call, and its `ValidateError` is raised at every call.

        Args:
            key: identifies the result.
            run: makes it.
            label: what progress and errors call the stage; default: the key.
            shown: it may take long, so progress shows it.
        """
        if key not in self._results:
            with self.step(label or key, shown=shown):
                try:
                    with naming_extras():
                        self._results[key] = run()
                except ValidateError as exc:
                    self._results[key] = exc
                    raise
        result: T | ValidateError = self._results[key]
        if isinstance(result, ValidateError):
            raise result
        return result

    def drop(self, key: str) -> bool:
        """Let go of a result, so that its memory can be freed; return whether there was one."""
        return self._results.pop(key, None) is not None

    def take(self, other: Stages, keys: Iterable[str]) -> None:
        """Take results over from the stages of another case."""
        self._results.update({key: other._results[key] for key in keys})

    @contextmanager
    def step(self, label: str, runtime: str = "", *, shown: bool = True) -> Iterator[None]:
        """Enclose a step that runs each time; an exception that leaves it carries the label as ``stage``."""
        text = f"{self._case}: {label}{f' on {runtime}' if runtime else ''}"
        with self._progress.step(text) if shown else nullcontext():
            try:
                with naming_extras():
                    yield
            except Exception as exc:
                if getattr(exc, "stage", None) is None:
                    exc.stage = label  # type: ignore[attr-defined]
                raise
