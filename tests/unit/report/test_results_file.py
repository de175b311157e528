# SPDX-License-Identifier: Apache-2.0
"""Results of a run lie in a file, not in memory, and none is lost."""

from __future__ import annotations

import errno
import gc
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import HOSTILE, sample_report, sample_result

from qeff_validate.cli.made_results import MadeResults
from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.protocols import Settings
from qeff_validate.report.lazy_results import LazyResults, planned_results
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result
from qeff_validate.report.results_file import NAME, ResultsFile


def cases(count: int) -> list[tuple[Case, str]]:
    return [(Case(name=f"c{number}", source="random:bert"), "ort") for number in range(count)]


@pytest.mark.parametrize("text", HOSTILE)
def test_result_is_read_as_it_was_written(text: str, tmp_path: Path) -> None:
    file, result = ResultsFile(tmp_path), sample_result(text=text, status="fail", reason=text)
    first, second = file.add("a", result), file.add("b", replace(result, case="d"))
    assert file.at(first).plain() == result.plain()
    assert file.at(second).case == "d"
    assert [line.key for line in ResultsFile(tmp_path).read().values()] == ["a", "b"]


def test_another_run_in_the_folder_takes_no_result_from_this_one(tmp_path: Path) -> None:
    file, other = ResultsFile(tmp_path), ResultsFile(tmp_path)
    for each in (file, other):
        each.clear()
    line = file.add("a", sample_result(reason="mine"))
    other.add("a", sample_result(reason="theirs"))
    later = file.add("a", sample_result(reason="mine too"))
    assert [file.at(each).reason for each in (line, later)] == ["mine", "mine too"]


def test_file_that_was_changed_is_said_so(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path)
    line = file.add("a", sample_result())
    (tmp_path / NAME).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"results\.jsonl was changed while it was in use"):
        file.at(line)


def test_results_of_an_earlier_run_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ResultsFile(tmp_path).begin([("a", sample_result(reason="earlier"))])
    before = (tmp_path / NAME).read_bytes()

    def cut_off(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        with pytest.raises(ValidateError, match="No space left on device"):
            ResultsFile(tmp_path).begin([("b", sample_result())])
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == before


def test_disk_that_is_full_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = cases(3)
    made = MadeResults(tmp_path, planned, Settings(), None)
    write = os.write

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) > 100:
            return write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made["c0", "ort"] = sample_result("c0")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        made["c1", "ort"] = sample_result("c1")
    made["c2", "ort"] = sample_result("c2")
    lines = (tmp_path / NAME).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["result"]["case"] for line in lines] == ["c0", "c2"]
    assert [made[case.name, "ort"].case for case, _ in planned] == ["c0", "c1", "c2"]


def test_first_result_that_finds_a_full_disk_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = ResultsFile(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ValidateError, match="No space left on device"):
            file.add("a", sample_result("c0"))
    line = file.add("a", sample_result("c1"))
    assert file.at(line).case == "c1"
    assert [*ResultsFile(tmp_path).read()] == [("c1", "ort")]


def test_result_is_written_whole_by_many_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    file = ResultsFile(tmp_path)
    assert file.at(file.add("a", sample_result())).plain() == sample_result().plain()


def test_run_that_is_resumed_begins_with_what_was_made(tmp_path: Path) -> None:
    planned = cases(3)
    first = MadeResults(tmp_path, planned, Settings(), None)

    def cut_off() -> None:
        with first.reported_if_interrupted():
            first["c1", "ort"] = sample_result("c1")
            first["c2", "ort"] = sample_result("c2", status="error")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    again = MadeResults(tmp_path, planned, Settings(), tmp_path)  # an error is made anew
    with again.reported_if_interrupted():
        assert [*again] == [("c1", "ort")]
        assert again["c1", "ort"].plain() == sample_result("c1").plain()
        again["c0", "ort"] = sample_result("c0")
    assert [*ResultsFile(tmp_path).read()] == [("c1", "ort"), ("c0", "ort")]


def test_a_report_that_takes_long_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, list[float]()

    def write(*_: object) -> None:
        nonlocal now
        written.append(now)
        now += 4

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("qeff_validate.cli.made_results.write_texts", write)
    planned = cases(41)
    made = MadeResults(tmp_path, planned, Settings(), None)
    for case, name in planned:
        made[case.name, name] = sample_result(case.name)
        now += 5
    assert written == [0.0, 84.0, 168.0]  # 4 s are a twentieth of 80 s


def test_many_results_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 results took 20 MB; what may grow is 2 MB, with all that is made of them."""
    read = MadeResults.__getitem__

    def read_without_garbage(made: MadeResults, place: tuple[str, str]) -> Result:
        gc.collect()
        return read(made, place)

    monkeypatch.setattr(MadeResults, "__getitem__", read_without_garbage)
    samples = [result.plain() for result in sample_report(5, text="\U0001f600").results]

    def peak(count: int) -> int:
        planned = cases(count)
        made = MadeResults(tmp_path / str(count), planned, Settings(), None)
        gc.freeze()
        tracemalloc.start()
        try:
            for number, (case, name) in enumerate(planned):
                plain = {**samples[number % 5], "case": case.name, "runtime": name}
                made[case.name, name] = Result.from_plain(json.loads(json.dumps(plain)))
            report = Report(planned_results([(case.name, name) for case, name in planned], made, ""))
            report.write(tmp_path / str(count))
            assert report.exit_code() == 1
            assert report.closing()
            assert report.problems()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            gc.unfreeze()

    peak(5)  # modules and templates are loaded
    assert (peak(100) - peak(20)) / 80 < 2e3  # measured: 1.3e3


def test_lazy_results_are_a_sequence() -> None:
    results = LazyResults(4, lambda place: Result("c", str(place), "pass"))
    assert [result.runtime for result in results] == ["0", "1", "2", "3"]
    assert [result.runtime for result in results[1:3]] == ["1", "2"]
    assert results[-1].runtime == "3"
    with pytest.raises(IndexError):
        results[4]
    missing = planned_results([("c", "ort"), ("d", "ort")], {("d", "ort"): Result("d", "ort", "pass")}, "cut off")
    assert [(result.status, result.reason) for result in missing] == [("not_run", "cut off"), ("pass", "")]
