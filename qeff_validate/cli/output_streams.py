# SPDX-License-Identifier: Apache-2.0
"""Standard output and error of the command line, which may be full, closed, or unable to encode our characters.

A failed print must not look like a verdict: Python and rich would end with exit code 1, which means a mismatch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qeff_validate.errors import Unavailable


class OutputStream:
    """A text stream that raises its first write error as Unavailable, or none; afterwards it writes to the null device.

    Args:
        stream: the text stream.
        name: for the error.
        silent: raise no error.
    """

    def __init__(self, stream: Any, name: str, *, silent: bool) -> None:
        self._stream, self._name, self._silent = stream, name, silent

    def write(self, text: str) -> int:
        """Write text and return its length.

        Raises:
            Unavailable: the text cannot be written, and the stream is not silent.
        """
        with self._translated():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer.

        Raises:
            Unavailable: the buffer cannot be written, and the stream is not silent.
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
        """Redirect the file descriptor to the null device, for buffered text and output of native code."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr``; errors of the latter, which shows progress, are ignored."""
    _open_descriptors()
    original = sys.stdout, sys.stderr
    streams = [stream or open(os.devnull, "w", encoding="utf-8") for stream in original]  # noqa: SIM115
    for stream in streams:
        with suppress(AttributeError, ValueError, OSError):  # a replaced stream may have no encoding to configure
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = OutputStream(streams[0], "the standard output", silent=False)
    sys.stderr = OutputStream(streams[1], "the standard error", silent=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = original


def _open_descriptors() -> None:
    """Open the file descriptors 0 to 2 that are closed, so that no later file gets one of these numbers."""
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            return
