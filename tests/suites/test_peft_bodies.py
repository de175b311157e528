# SPDX-License-Identifier: Apache-2.0
"""Methods of PEFT on architectures: configs/peft.yaml. ``make support`` tries every pair."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ARCHITECTURES, METHODS, RUNTIMES

from qeff_validate.case import Case
from qeff_validate.engine import Runner, load

EVERY = [case for case in load([Path(__file__).parents[2] / "configs" / "peft.yaml"]) if "random:" in case.source]
CASES = [case for case in EVERY if not case.options.get("mixed_batch")]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    gc.disable()  # an export makes millions of objects and no garbage: collecting is a fifth of it
    yield Runner()
    gc.enable()
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_adapted_body_agrees_with_peft_on_ort_and_sim(case: Case, runner: Runner) -> None:
    results = [runner.result(case, name) for name in RUNTIMES]
    gc.collect()
    assert [result.status for result in results] == ["pass", "pass"], [result.reason for result in results]
    assert all(result.compared >= 60 for result in results)  # base, two adapters, and base and one again


def test_config_has_each_method_twice_and_each_architecture() -> None:
    sources = {f"random:{architecture.source}" for architecture in ARCHITECTURES.values()}
    assert {case.source for case in CASES} == sources
    methods = [case.options["peft_method"] for case in CASES]
    assert {method: methods.count(method) for method in methods} == dict.fromkeys(METHODS, 2)
