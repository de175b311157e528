# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: exit at once while there is nothing to clean up, later raise an exception to kill children."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # signals are not handled until the imports of this module are done, so `typing` is not imported
if TYPE_CHECKING:
    from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""The exit codes of a shell for a process that was ended by these signals."""

_received: list[int] = []
"""Received signals. Libraries swallow the exception (in a ``__del__``, in an import), so each step checks them too."""


class Interruption(KeyboardInterrupt):
    """SIGINT came.

    A class of its own, because Python ends by the signal, whatever our exit code, once a plain KeyboardInterrupt has
    left a library's ``exec`` under ``python -m`` (``unhandled_keyboard_interrupt`` in CPython's ``pythonrun.c``).
    """


def exit_on_signals() -> None:
    """Exit at once on a signal: only modules are loaded, so there is nothing to clean up."""
    _received.clear()
    for number in EXIT_CODES:
        signal.signal(number, _exit)


def raise_on_signals() -> None:
    """Raise an exception in the main thread on a signal."""
    sys.unraisablehook = _quiet_hook
    for number in EXIT_CODES:
        signal.signal(number, _raise)


def exit_code() -> int | None:
    """Return the exit code for the first received signal; None if there was none."""
    return EXIT_CODES[signal.Signals(_received[0])] if _received else None


def raise_if_received() -> None:
    """Raise the exception of the first received signal, if there was one.

    Raises:
        Interruption: it was SIGINT.
        SystemExit: it was SIGTERM.
    """
    code = exit_code()
    if code == EXIT_CODES[signal.SIGTERM]:
        sys.exit(code)
    if code is not None:
        raise Interruption


def _exit(signum: int, _frame: Any) -> None:
    os.write(2, b"qeff-validate: interrupted\n")
    os._exit(EXIT_CODES[signal.Signals(signum)])


def _raise(signum: int, _frame: Any) -> None:
    _received.append(signum)
    raise_if_received()


def _quiet_hook(unraisable: Any) -> None:
    """Do not report an interruption that a library has swallowed; it is raised again at the end of the step."""
    if not issubclass(unraisable.exc_type, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(unraisable)
