# SPDX-License-Identifier: Apache-2.0
"""Progress: lines in a log, a spinner on a terminal, estimates of earlier runs, what came from the store."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import until

from qeff_validate.cli import progress as module
from qeff_validate.cli.progress import TerminalProgress
from qeff_validate.config.case import Case
from qeff_validate.engine import validate
from qeff_validate.pipeline.stages import NumberedProgress
from qeff_validate.report import notebook_progress
from qeff_validate.report.kept_numbers import MOST_NUMBERS
from qeff_validate.report.notebook_progress import NotebookProgress, in_notebook
from qeff_validate.report.step_times import StepTimes


def logged(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to standard error, which is no terminal; in the test itself, as pytest replaces it before."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_long_step_has_a_line_in_a_log_before_it_ends_although_stderr_is_redirected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = logged(monkeypatch)
    monkeypatch.setattr(module, "LONG_S", 0.01)
    monkeypatch.setattr(module, "SHOWN_S", 0.0)
    with TerminalProgress(False).step("bert: export"), redirect_stderr(io.StringIO()):
        until(lambda: "bert: export: running\n" in log.getvalue(), "the line of a step that runs")
    assert log.getvalue().splitlines()[1].startswith("bert: export: ")


def test_short_step_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(monkeypatch)
    with TerminalProgress(False).step("bert: compare"):
        pass
    assert log.getvalue() == ""


def test_verbose_tells_the_start_and_how_long_it_took_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logged(monkeypatch)
    times = tmp_path / "times.json"
    StepTimes(times).keep("bert: export", 19.6)
    with TerminalProgress(True, times=times).step("[2/9] bert: export"):
        pass
    assert log.getvalue() == "[2/9] bert: export: running, 20 s last time\n"


def test_quiet_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(monkeypatch)
    monkeypatch.setattr(module, "SHOWN_S", 0.0)
    with TerminalProgress(True, quiet=True).step("bert: export"):
        pass
    assert log.getvalue() == ""


def test_durations_are_kept_without_the_number_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOWN_S", 0.0)
    times = tmp_path / "store" / "times.json"
    with TerminalProgress(False, times=times).step("[1/3] bert: export"):
        pass
    assert not times.parent.exists(), "a bundle needs no store"
    times.parent.mkdir()
    with TerminalProgress(False, times=times).step("[1/3] bert: export"):
        pass
    assert [*json.loads(times.read_text())] == ["bert: export"]


@pytest.mark.parametrize("text", ["", "[", "[]", "3", '{"a": "x"}', '{"a": NaN}', "[" * 100_000])
def test_broken_file_with_durations_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    assert StepTimes(path).seconds("a") is None
    StepTimes(path).keep("a", 2.0)
    assert StepTimes(path).seconds("a") == 2.0


def test_only_the_latest_steps_are_kept_and_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({f"s{at}": 1.0 for at in range(MOST_NUMBERS)}))
    StepTimes(path).keep("new", 2.0)
    kept = json.loads(path.read_text())
    assert (len(kept), "s0" in kept, kept["new"]) == (MOST_NUMBERS, False, 2.0)
    StepTimes(path / "below-a-file.json").keep("a", 1.0)
    StepTimes(None).keep("a", 1.0)


def test_spinner_shows_a_step_within_a_step_and_its_elapsed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(module, "SHOWN_S", 60)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    progress = TerminalProgress(False)
    first, second = progress.step("bert: export"), progress.step("gpt2: export")  # of two processes
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert progress._live is not None, "the other step still runs"
    second.__exit__(None, None, None)
    progress.overview("0 of 2 results")
    with progress.step("bert: compile"):
        until(lambda: "0 of 2 results" in stream.getvalue(), "the line of the whole run")
        progress.overview("1 of 2 results")
        until(lambda: "1 of 2 results" in stream.getvalue(), "its next text")
    assert progress._live is None, "the line of the whole run is no step"
    stream.truncate(0)
    with progress.step("bert: faults"), progress.step("bert: reference [float64]"):
        until(lambda: "bert: reference [float64]" in stream.getvalue(), "the inner step")
    assert "bert: faults" in stream.getvalue()
    assert "0:00:0" in stream.getvalue()
    assert progress._live is None


class Told:
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.lines: list[str] = []

    def step(self, text: str) -> Any:
        self.steps.append(text)
        return redirect_stderr(sys.stderr)

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_results_are_numbered_if_there_are_several() -> None:
    told = Told()
    numbered = NumberedProgress(told, 3)
    numbered.number = 2
    numbered.step("bert: export")
    NumberedProgress(told, 1).step("bert: export")
    assert told.steps == ["[2/3] bert: export", "bert: export"]


@pytest.mark.integration
def test_run_numbers_its_results_and_tells_what_came_from_the_store(tmp_path: Path) -> None:
    case = Case(name="bert", source="random:bert", exporter="torchscript", tolerance="table", runtimes=["torch", "ort"])
    first, again = Told(), Told()
    validate(case, store=tmp_path, progress=first)
    validate(case, store=tmp_path, progress=again)
    assert first.steps[0].startswith("[1/2] bert: ")
    assert first.steps[-1] == "[2/2] bert: compare on ort"
    assert first.lines == []
    stored = [line.partition(" from the store, made in ")[0] for line in again.lines]
    assert stored == ["bert: reference:", "bert: export:"]


def test_notebook_shows_running_steps_with_elapsed_and_earlier_time_and_nothing_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook_progress, "PERIOD_S", 0.01)
    monkeypatch.setattr(notebook_progress, "SHOWN_S", 0.0)
    times = tmp_path / "times.json"
    StepTimes(times).keep("bert: export <1>", 19.6)
    shown: list[str] = []
    progress = NotebookProgress(shown.append, times)
    with progress.step("[2/9] bert: export <1>"), progress.step("inner"):
        begun = len(shown)
        until(lambda: len(shown) > begun + 2, "the elapsed time is shown anew")
        inside = shown[-1]
    assert re.findall(r">([^<]*)</div>", inside) == [
        "[2/9] bert: export &lt;1&gt;, 20 s last time · 0 s",
        "inner · 0 s",
    ]
    assert shown[-1] == ""
    assert {*json.loads(times.read_text())} == {"bert: export <1>", "inner"}


def test_notebook_is_known_by_the_kernel_of_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not in_notebook()
    for shell, expected in ((None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=object()), True)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert in_notebook() == expected
