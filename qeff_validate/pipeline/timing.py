# SPDX-License-Identifier: Apache-2.0
"""How long each run of a session takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from qeff_validate.protocols import Session
from qeff_validate.tensors import Shapes, Tensors, TensorSpec


class TimedSession:
    """A session that notes how long each run took."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.shapes: tuple[Shapes, ...] = session.shapes
        self._seconds: list[float] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run and take the time."""
        start = time.perf_counter()
        out = self._session.run(feeds, fetch=fetch)
        self._seconds.append(time.perf_counter() - start)
        return out

    def reset(self) -> None:
        """Forget retained state."""
        self._session.reset()

    def timings(self, rows: int) -> dict[str, float]:
        """Return first run, median of the later ones, their number, and rows per second over all."""
        first, rest = self._seconds[0], self._seconds[1:] or self._seconds
        return {
            "first_run": round(first, 6),
            "median_run": round(median(rest), 6),
            "runs": len(self._seconds),
            "rows_per_s": round(rows / sum(self._seconds), 2),
        }
