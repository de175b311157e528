# SPDX-License-Identifier: Apache-2.0
"""Messages between two processes: one line of JSON, then the bytes of the arrays that it lists."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

from qeff_validate.tensors import Array, Tensors


class Closed(Exception):
    """The other process has closed its end, or ended."""


class Channel:
    """One end of a socket pair.

    The socket's time-out applies to each read and write, so every message of the other process restarts it.

    Args:
        end: a connected stream socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._reader = end.makefile("rb")

    def send(self, header: Mapping[str, Any], arrays: Tensors | None = None) -> None:
        """Send one message.

        Args:
            header: JSON data.
            arrays: by name; any dtype and shape.

        Raises:
            Closed: the other process has closed its end.
            TimeoutError: the other process does not read.
        """
        parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        # the shape of the original array, as a contiguous copy has at least one dim
        listed = [(name, part.dtype.str, np.shape((arrays or {})[name])) for name, part in parts.items()]
        try:
            self._end.sendall(json.dumps({**header, "arrays": listed}).encode() + b"\n")
            for part in parts.values():
                self._end.sendall(part.reshape(-1).view(np.uint8).data)
        except ConnectionError as exc:
            raise Closed from exc

    def receive(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Receive one message: its header and its arrays, which own their memory.

        Raises:
            Closed: the other process has closed its end.
            TimeoutError: no message arrives in time.
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
        """Close this end; the other process receives `Closed`."""
        self._reader.close()
        self._end.close()
