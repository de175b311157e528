# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: end at once while nothing is held, later by an exception, so that children are killed."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # what is imported before the handlers are set is a time in which no signal is heeded
if TYPE_CHECKING:
    from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""What a shell makes of a process that ended by these signals."""

_received: list[int] = []
"""Signals so far. Libraries swallow the exception (in a ``__del__``, in an import), so each step looks here too."""


def exit_on_signals() -> None:
    """End at once from now on: only modules are loaded, so there is nothing to clean up."""
    _received.clear()
    for number in EXIT_CODES:
        signal.signal(number, _exit)


def raise_on_signals() -> None:
    """Raise an exception from now on, in the main thread."""
    sys.unraisablehook = _quiet_hook
    for number in EXIT_CODES:
        signal.signal(number, _raise)


def exit_code() -> int | None:
    """Return the exit code for the first signal so far; None if there was none."""
    return EXIT_CODES[signal.Signals(_received[0])] if _received else None


def raise_if_received() -> None:
    """Raise KeyboardInterrupt after a SIGINT, SystemExit after a SIGTERM.

    Raises:
        KeyboardInterrupt, SystemExit: there was one.
    """
    code = exit_code()
    if code == EXIT_CODES[signal.SIGTERM]:
        sys.exit(code)
    if code is not None:
        raise KeyboardInterrupt


def _exit(signum: int, _frame: Any) -> None:
    os.write(2, b"qeff-validate: interrupted\n")
    os._exit(EXIT_CODES[signal.Signals(signum)])


def _raise(signum: int, _frame: Any) -> None:
    _received.append(signum)
    raise_if_received()


def _quiet_hook(unraisable: Any) -> None:
    """Keep quiet about our own interruption if it was swallowed; it is raised again at the end of the step."""
    if not issubclass(unraisable.exc_type, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(unraisable)
