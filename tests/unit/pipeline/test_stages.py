# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qeff_validate.errors import BuildError
from qeff_validate.pipeline.stages import Stages


class Shown:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        self.steps.append(text)
        yield

    def line(self, text: str) -> None:
        raise AssertionError(text)


def test_stage_runs_once_by_its_key_and_is_shown_by_its_label() -> None:
    progress, runs = Shown(), []
    stages = Stages("case", progress)
    for _ in range(2):
        assert stages.once("floor.fp16", lambda: runs.append("floor") or 7, "noise floor in fp16", shown=True) == 7
        assert stages.once("inputs", lambda: runs.append("inputs") or 8) == 8
    assert runs == ["floor", "inputs"]
    assert progress.steps == ["case: noise floor in fp16"], "only long stages are shown"


def test_failed_stage_stays_failed_with_its_label_and_a_crash_is_tried_again() -> None:
    stages, runs = Stages("case", Shown()), []

    def fail(error: Exception) -> None:
        runs.append(error)
        raise error

    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            stages.once("export", lambda: fail(BuildError("no")), "export to ONNX")
        assert caught.value.stage == "export to ONNX"
        with pytest.raises(ZeroDivisionError) as crash:
            stages.once("sample", lambda: fail(ZeroDivisionError()), "rows to measure")
        assert crash.value.stage == "rows to measure"
    assert len(runs) == 3


def test_result_can_be_dropped_and_taken_over() -> None:
    stages, other = Stages("one", Shown()), Stages("two", Shown())
    stages.once("module", lambda: "weights")
    other.take(stages, ("module",))
    assert stages.drop("module")
    assert not stages.drop("module")
    assert stages.once("module", lambda: "new") == "new"
    assert other.once("module", lambda: "never") == "weights"
