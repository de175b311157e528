# SPDX-License-Identifier: Apache-2.0
"""A runtime with a fault in its sessions, in place of a registered one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qeff_validate.artifact import Artifact
from qeff_validate.protocols import Session, capabilities, runtime


class FaultyRuntime:
    """A runtime whose sessions have a fault; name, kind and capabilities are those of the real one.

    Args:
        fault: takes a session and returns the session with the fault.
        name: of the real runtime.
    """

    def __init__(self, fault: Callable[[Session], Session], name: str = "ort") -> None:
        self._inner, self._fault = runtime(name), fault
        self.name, self.kind = self._inner.name, self._inner.kind
        self.capabilities = capabilities(self._inner)

    def probe(self) -> str | None:
        """Return the answer of the real one."""
        return self._inner.probe()

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open an artifact, and yield a session with the fault."""
        with self._inner.open(artifact) as session:
            yield self._fault(session)
