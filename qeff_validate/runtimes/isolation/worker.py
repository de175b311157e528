# SPDX-License-Identifier: Apache-2.0
"""The child process of `isolation.parent.IsolatedRuntime`: opens an artifact and serves requests until it is closed.

python -m qeff_validate.runtimes.isolation.worker SOCKET PARENT
"""

from __future__ import annotations

import logging
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
from qeff_validate.memory import release_memory
from qeff_validate.protocols import Session, Settings, runtime
from qeff_validate.runtimes.isolation.channel import Channel, Closed
from qeff_validate.sdk.processes import bound_to_parent
from qeff_validate.tensors import Tensors, TensorSpec


class LogForwarder(logging.Handler):
    """Sends log records of this library to the parent, which logs them; each one restarts the parent's time limit.

    Args:
        channel: to the parent.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._channel.send({"note": record.getMessage()})


def serve(channel: Channel) -> None:
    """Open one artifact after another, and serve the requests of each until it is closed.

    Raises:
        Closed: the parent has closed its end or ended; the artifact is released.
    """
    while True:
        request, _ = channel.receive()
        _serve_artifact(channel, request)


def _serve_artifact(channel: Channel, request: dict[str, Any]) -> None:
    settings = Settings.from_plain(request["settings"])
    fields = request["artifact"]
    artifact = {**fields, "path": Path(fields["path"]), "buckets": tuple(fields["buckets"])}
    try:
        with runtime(request["runtime"], settings).open(Artifact(**artifact)) as session:
            channel.send(_description(session))
            _serve_requests(channel, session)
        del session
        release_memory()  # the process may wait for another artifact
        channel.send({})
    except Closed:
        raise
    except Exception as exc:
        channel.send(_error(exc))


def _serve_requests(channel: Channel, session: Session) -> None:
    while True:
        request, feeds = channel.receive()
        if request["do"] == "close":
            return
        reply: dict[str, str] = {}
        outputs: Tensors = {}
        try:
            if request["do"] == "reset":
                session.reset()
            else:
                outputs = session.run(feeds, fetch=request["fetch"])
        except Exception as exc:
            reply = _error(exc)
        channel.send(reply, outputs)


def _description(session: Session) -> dict[str, Any]:
    return {
        "inputs": [_spec(spec) for spec in session.inputs],
        "outputs": [_spec(spec) for spec in session.outputs],
        "shapes": [dict(shapes) for shapes in session.shapes],
    }


def _spec(spec: TensorSpec) -> tuple[Any, ...]:
    return spec.name, spec.dtype, spec.shape


def _error(exc: Exception) -> dict[str, str]:
    """Return the nearest base class of an error in `qeff_validate.errors`, and its text."""
    if isinstance(exc, ValidateError):
        base = next(cls for cls in type(exc).__mro__ if getattr(errors, cls.__name__, None) is cls)
        return {"error": base.__name__, "text": str(exc)}
    where = "".join(traceback.format_exception(exc)[-3:])
    return {"error": "RunError", "text": f"unexpected {type(exc).__name__}: {exc}\n{where}".rstrip()}


def main(arguments: Sequence[str]) -> int:
    """Serve requests on the socket that the parent has passed on.

    Args:
        arguments: file descriptor of the socket, and process id of the parent.
    """
    number, parent = map(int, arguments)
    if not bound_to_parent(parent):
        return 1
    channel = Channel(socket.socket(fileno=number))
    logging.getLogger("qeff_validate").addHandler(LogForwarder(channel))
    with suppress(Closed):
        serve(channel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
