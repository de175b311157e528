# SPDX-License-Identifier: Apache-2.0
"""Results of a pytest session wait on the disk; where it takes none, in memory, and none is lost."""

from __future__ import annotations

import errno
import os
import tracemalloc
from types import SimpleNamespace

import pytest

from qeff_validate.report.kept_results import KeptResults
from qeff_validate.report.result import Result
from qeff_validate.session_outcome import SessionOutcome


def result(number: int, length: int = 10) -> Result:
    return Result(f"case{number}", "ort", "fail", reason=f"{number}" + "ü" * length, planned=3, compared=2)


def test_results_are_read_in_any_order_as_they_were() -> None:
    kept = KeptResults()
    reads = [kept.keep(result(number).plain()) for number in range(5)]
    assert [reads[place]() for place in (3, 0, 4, 4, 1)] == [result(place) for place in (3, 0, 4, 4, 1)]


def test_full_disk_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    write, taken = os.write, 0

    def write_until_full(descriptor: int, text: bytes) -> int:
        nonlocal taken
        if taken == 1500:
            raise OSError(errno.ENOSPC, "no space left")
        count = write(descriptor, text[: 1500 - taken])
        taken += count
        return count

    monkeypatch.setattr(os, "write", write_until_full)
    kept = KeptResults()
    reads = [kept.keep(result(number, 200).plain()) for number in range(5)]
    assert taken == 1500
    assert [read() for read in reads] == [result(number, 200) for number in range(5)]


def reported(outcome: SessionOutcome, number: int, length: int = 10) -> SimpleNamespace:
    report = SimpleNamespace(
        nodeid=f"t.py::test[{number}]", when="call", outcome="failed", longrepr="no",
        qv_target=[f"case{number}", "ort"], qv_result=result(number, length).plain(),
    )  # fmt: skip
    outcome.pytest_runtest_logreport(report)
    return report


def test_session_holds_little_of_its_results() -> None:
    outcome = SessionOutcome()
    reported(outcome, 0)
    tracemalloc.start()
    try:
        reports = [reported(outcome, number, 20_000) for number in range(1, 501)]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 1 << 20, "2 MB for 1,000 results"
    assert not any(hasattr(report, "qv_result") for report in reports), "pytest keeps them"
    results = outcome.all_results()
    assert len(results) == 501
    assert results[1] == result(1, 20_000)
    assert [each.case for each in results] == sorted(each.case for each in results)


def test_worker_leaves_results_to_the_controller() -> None:
    outcome = SessionOutcome(worker=True)
    assert hasattr(reported(outcome, 0), "qv_result")
    assert not outcome.results
