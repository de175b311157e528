# SPDX-License-Identifier: Apache-2.0
"""Requests and replies between two processes: one line of JSON, then the bytes of the arrays that it lists."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

from qeff_validate.tensors import Array, Tensors


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """One end of a socket pair. A time-out of the socket is the time in which the other side says nothing."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._reader = end.makefile("rb")

    def send(self, header: Mapping[str, Any], arrays: Tensors | None = None) -> None:
        """Send one message.

        Raises:
            Closed: nobody reads it.
            TimeoutError: it is not taken.
        """
        parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        # the shape is that of the array as given: contiguous copies have at least one dim
        listed = [(name, part.dtype.str, np.shape((arrays or {})[name])) for name, part in parts.items()]
        try:
            self._end.sendall(json.dumps({**header, "arrays": listed}).encode() + b"\n")
            for part in parts.values():
                self._end.sendall(part.reshape(-1).view(np.uint8).data)
        except ConnectionError as exc:
            raise Closed from exc

    def receive(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the next message; its arrays are read into their own memory.

        Raises:
            Closed: there is none.
            TimeoutError: it does not come.
        """
        arrays: dict[str, Array] = {}
        try:
            line = self._reader.readline()
            if not line.endswith(b"\n"):
                raise Closed
            header = json.loads(line)
            for name, dtype, shape in header.pop("arrays"):
                arrays[name] = np.empty(shape, dtype)
                memory = arrays[name].reshape(-1).view(np.uint8).data
                if self._reader.readinto(memory) != memory.nbytes:
                    raise Closed
        except ConnectionError as exc:
            raise Closed from exc
        return header, arrays

    def close(self) -> None:
        """Hang up; the other side sees it."""
        self._reader.close()
        self._end.close()
