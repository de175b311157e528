# SPDX-License-Identifier: Apache-2.0
"""How long each run of a session takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from qeff_validate.protocols import Session
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Tensors


class TimedSession(SessionWrapper):
    """A session that measures the duration of each run."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._seconds: list[float] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run the wrapped session and record the duration."""
        start = time.perf_counter()
        outputs = super().run(feeds, fetch=fetch)
        self._seconds.append(time.perf_counter() - start)
        return outputs

    def timings(self, rows: int) -> dict[str, float]:
        """Return first run, median of the later ones, their number, and rows per second over all."""
        first, rest = self._seconds[0], self._seconds[1:] or self._seconds
        return {
            "first_run": round(first, 6),
            "median_run": round(median(rest), 6),
            "runs": len(self._seconds),
            "rows_per_s": round(rows / sum(self._seconds), 2),
        }
