# SPDX-License-Identifier: Apache-2.0
"""The process behind `isolated.Isolated`: opens one artifact, answers until it is told to close or nobody asks.

python -m qeff_validate.runtimes.isolation.worker SOCKET PARENT
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qeff_validate import errors
from qeff_validate.artifact import Artifact
from qeff_validate.errors import ValidateError
from qeff_validate.protocols import Session, Settings, runtime
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.sdk.processes import die_with_parent
from qeff_validate.tensors import Tensors, TensorSpec


class Notes(logging.Handler):
    """Sends what this library logs to the parent, which logs it, and which takes it for a sign of life."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._channel.send({"note": record.getMessage()})


def answer(channel: Channel) -> None:
    """Open what the first request names and answer the others.

    Raises:
        Closed: the parent is gone; the artifact is released.
    """
    request, _ = channel.receive()
    settings = {**request["settings"], "device_ids": tuple(request["settings"]["device_ids"])}
    given = request["artifact"]
    artifact = {**given, "path": Path(given["path"]), "buckets": tuple(given["buckets"])}
    try:
        with runtime(request["runtime"], Settings(**settings)).open(Artifact(**artifact)) as session:
            channel.send(_described(session))
            _serve(channel, session)
        channel.send({})
    except Closed:
        raise
    except Exception as exc:
        channel.send(_told(exc))


def _serve(channel: Channel, session: Session) -> None:
    while True:
        request, feeds = channel.receive()
        if request["do"] == "close":
            return
        reply: dict[str, str] = {}
        found: Tensors = {}
        try:
            if request["do"] == "reset":
                session.reset()
            else:
                found = session.run(feeds, fetch=request["fetch"])
        except Exception as exc:
            reply = _told(exc)
        channel.send(reply, found)


def _described(session: Session) -> dict[str, Any]:
    return {
        "inputs": [_spec(spec) for spec in session.inputs],
        "outputs": [_spec(spec) for spec in session.outputs],
        "shapes": [dict(shapes) for shapes in session.shapes],
        "simulated": bool(getattr(session, "simulated", False)),
    }


def _spec(spec: TensorSpec) -> tuple[Any, ...]:
    return spec.name, spec.dtype, spec.shape


def _told(exc: Exception) -> dict[str, str]:
    """Return an error as the nearest class of `errors` and its text."""
    if isinstance(exc, ValidateError):
        known = next(cls for cls in type(exc).__mro__ if getattr(errors, cls.__name__, None) is cls)
        return {"error": known.__name__, "text": str(exc)}
    where = "".join(traceback.format_exception(exc)[-3:])
    return {"error": "RunError", "text": f"unexpected {type(exc).__name__}: {exc}\n{where}".rstrip()}


def main(arguments: Sequence[str]) -> int:
    """Answer on a socket that the parent has left open for this process."""
    number, parent = map(int, arguments)
    die_with_parent()
    if os.getppid() != parent:
        return 1  # it died before we could ask
    channel = Channel(socket.socket(fileno=number))
    logging.getLogger("qeff_validate").addHandler(Notes(channel))
    with suppress(Closed):
        answer(channel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
