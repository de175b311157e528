# SPDX-License-Identifier: Apache-2.0
"""Standard output and error of the command line, which may be full, closed, or of an encoding without our characters.

What cannot be printed must not look like a verdict: Python and rich end with exit code 1 then, which means a mismatch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qeff_validate.errors import Unavailable


class OutputStream:
    """A text stream that fails once, with an error of ours, or never; after a failure it goes to the null device."""

    def __init__(self, stream: Any, name: str, *, silent: bool) -> None:
        self._stream, self._name, self._silent = stream, name, silent

    def write(self, text: str) -> int:
        """Write text.

        Raises:
            Unavailable: it cannot be written, and the stream is not silent.
        """
        with self._translated():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered.

        Raises:
            Unavailable: it cannot be written, and the stream is not silent.
        """
        with self._translated():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            self._discard()
            if not self._silent:
                raise Unavailable(f"cannot write to {self._name}: {exc.strerror or exc}") from exc

    def _discard(self) -> None:
        """Let what is buffered, and what native code prints, go to the null device."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr`` meanwhile; on the latter, which shows progress, no failure is one."""
    _open_descriptors()
    before = sys.stdout, sys.stderr
    streams = [stream or open(os.devnull, "w", encoding="utf-8") for stream in before]  # noqa: SIM115
    for stream in streams:
        with suppress(AttributeError, ValueError, OSError):  # not every replacement of a stream can be configured
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = OutputStream(streams[0], "the standard output", silent=False)
    sys.stderr = OutputStream(streams[1], "the standard error", silent=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_descriptors() -> None:
    """Open what is closed of the descriptors 0 to 2, so that no file of ours gets one of these numbers."""
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            return
