# SPDX-License-Identifier: Apache-2.0
"""A runtime with a fault, for tests of what must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qeff_validate.artifact import Artifact
from qeff_validate.protocols import Session, runtime


class Faulty:
    """A runtime whose sessions are damaged, by default ONNX Runtime; its name and kind are those of the real one."""

    def __init__(self, damaged: Callable[[Session], Any], name: str = "ort") -> None:
        self._inner, self._damaged = runtime(name), damaged
        self.name, self.kind = self._inner.name, self._inner.kind
        self.sdk = getattr(self._inner, "sdk", None)

    def probe(self) -> str | None:
        return None

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Any]:
        with self._inner.open(artifact) as session:
            yield self._damaged(session)
