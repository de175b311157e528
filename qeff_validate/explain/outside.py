# SPDX-License-Identifier: Apache-2.0
"""What is wrong outside of a graph: rows in the wrong place, outputs changed on their way, feeds, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qeff_validate.explain.differences import difference
from qeff_validate.explain.matching import relative_error
from qeff_validate.protocols import Session
from qeff_validate.runtimes.session_wrapper import SessionWrapper
from qeff_validate.tensors import RETAINED, Array, Tensors

SAME = 1e-4
"""Relative L2 below which two rows hold the same vector."""

OTHER_ROW = 0.1
"""Part of its own error below which a row's distance to another row counts as that row's."""


def outside_finding(expected: Array, actual: Array, labels: Sequence[str]) -> str:
    """Return how the outputs of a runtime differ from those that its file gives when it is run again.

    Args:
        expected: of the file, ``[rows, n]``.
        actual: of the runtime.
        labels: of the rows.
    """
    if expected.shape != actual.shape:
        return f"the output has shape {list(actual.shape)} instead of {list(expected.shape)}"
    wrong = [row for row in range(len(expected)) if not relative_error(expected[row], actual[row]) <= SAME]
    moved = _other_rows(expected, actual, wrong)
    if moved:
        row, source = next(iter(moved.items()))
        return f"{len(moved)} of {len(expected)} rows hold another row's output, first row {row} ({labels[row]!r}) that of row {source}"
    if not wrong:
        wrong = list(range(len(expected)))
    text = difference(expected[wrong], actual[wrong])
    if text.startswith("differs by") or "values differ" in text:
        return f"{len(wrong)} of {len(expected)} rows differ, first row {wrong[0]} ({labels[wrong[0]]!r})"
    return f"output {text}" if len(wrong) == len(expected) else f"output of {len(wrong)} rows, first row {wrong[0]}: {text}"


def _other_rows(expected: Array, actual: Array, wrong: Sequence[int]) -> dict[int, int]:
    """Return for each wrong row the row whose output it holds."""
    found = {}
    for row in wrong:
        own = relative_error(expected[row], actual[row])
        distances = [relative_error(other, actual[row]) for other in expected]
        nearest = int(np.argmin(distances))
        if nearest != row and np.isfinite(own) and distances[nearest] < min(OTHER_ROW * own, OTHER_ROW):
            found[row] = nearest
    return found


class ReadingSession(SessionWrapper):
    """A session that also reads back the retained inputs that it was fed, such as the tensors of an adapter.

    Args:
        session: open.
        names: of the inputs whose twins are read.

    Attributes:
        differences: of each input, by its name, what the runtime holds in place of what it was fed; the first time.
    """

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        super().__init__(session)
        known = {spec.name for spec in session.outputs}
        self._names = [name for name in names if f"{name}{RETAINED}" in known]
        self.differences: dict[str, str] = {}
        self.others: Mapping[str, Mapping[str, Any]] = {}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run, and compare what is read back with what was fed."""
        fed = [name for name in self._names if name in feeds]
        wanted = [spec.name for spec in self.outputs] if fetch is None else list(fetch)
        outputs = dict(self.session.run(feeds, fetch=[*wanted, *(f"{name}{RETAINED}" for name in fed)]))
        for name in fed:
            held = outputs.pop(f"{name}{RETAINED}")
            expected = feeds[name]
            if held.dtype != expected.dtype:
                expected = expected.astype(held.dtype)
            text = difference(expected, held, self.others.get(name))
            if text and name not in self.differences:
                self.differences[name] = text
        return outputs
