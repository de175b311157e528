# SPDX-License-Identifier: Apache-2.0
"""Results in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

from qeff_validate.config.case import Case
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.pipeline.executors.awaited_results import AwaitedResults
from qeff_validate.report.result import Result

PLANNED = [(Case(name=name, source="random:bert"), "ort") for name in ("a", "b", "c")]


class Backwards:
    """Makes the last result first, and stops with an error before one of them."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.asked, self.closed = broken, 0, False

    def results(self, planned: Sequence[tuple[Case, str]]) -> Generator[tuple[Case, str, Result]]:
        try:
            for case, name in reversed(planned):
                if case.name == self.broken:
                    raise Unavailable("no card")
                self.asked += 1
                yield case, name, Result(case.name, name, "pass")
        finally:
            self.closed = True


def test_each_waits_for_its_own_and_no_longer() -> None:
    executor = Backwards()
    awaited = AwaitedResults(executor, PLANNED)
    assert (awaited.get("b", "ort").case, executor.asked) == ("b", 2)
    assert (awaited.get("c", "ort").case, executor.asked) == ("c", 2)
    assert (("a", "ort") in awaited, ("a", "sim") in awaited) == (True, False)
    awaited.close()
    assert executor.closed


def test_error_is_raised_once_and_what_was_lost_says_so() -> None:
    awaited = AwaitedResults(Backwards("b"), PLANNED)
    with pytest.raises(Unavailable, match="no card"):
        awaited.get("a", "ort")
    assert awaited.get("c", "ort").status == "pass"
    with pytest.raises(RunError, match="b on ort: the processes have ended before"):
        awaited.get("b", "ort")
