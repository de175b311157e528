# SPDX-License-Identifier: Apache-2.0
"""Faults outside of a graph are told as such: rows, outputs, adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qeff_validate.explain.explain import revisits_finding
from qeff_validate.explain.inside_graph import overflow
from qeff_validate.explain.outside import BESIDE, ReadingSession, module_of, outside_finding
from qeff_validate.explain.reference_values import ReferenceValue, ReferenceValues
from qeff_validate.tensors import TensorSpec

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((6, 8)).astype(np.float32)
LABELS = [f"text {row}" for row in range(6)]


def first_zero(rows: Any) -> Any:
    rows[0] = 0
    return rows


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (
            lambda rows: np.roll(rows, 1, 0),
            "6 of 6 rows hold another row's output, first row 0 ('text 0') that of row 5",
        ),
        (first_zero, "output of 1 rows, first row 0: is zero"),
        (lambda rows: np.roll(rows, 1, 1), "output columns are shifted by 1"),
        (lambda rows: rows * 1.02, "output scaled by 1.02"),
        (lambda rows: rows.astype(np.float16).astype(np.float32), "output rounded to fp16"),
        (lambda rows: rows[:, :4], "the output has shape [6, 4] instead of [6, 8]"),
        (lambda rows: rows, BESIDE),
    ],
)
def test_change_of_the_outputs_is_told(change: Callable[[Any], Any], finding: str) -> None:
    assert outside_finding(ROWS, change(ROWS.copy()), LABELS) == finding


NAMES = [f"base_model.model.model.layers.{layer}.q_proj.lora_{part}.weight" for layer in (0, 1) for part in "AB"]
ADAPTERS = {
    "base": {name: np.zeros((2, 2), np.float32) for name in NAMES},
    "a": {name: RNG.standard_normal((2, 2)).astype(np.float32) for name in NAMES},
    "b": {name: RNG.standard_normal((2, 2)).astype(np.float32) for name in NAMES},
}


class Holder:
    """A session that holds what it is fed, after a change."""

    inputs = tuple(TensorSpec(name, "float32", (2, 2)) for name in NAMES)
    outputs = tuple(TensorSpec(f"{name}_RetainedState", "float32", (2, 2)) for name in NAMES)
    shapes = ()

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def run(self, feeds: Any, *, fetch: Any = None) -> Any:
        held = {f"{name}_RetainedState": array for name, array in self.change(dict(feeds)).items()}
        return {name: held[name] for name in fetch}

    def reset(self) -> None:
        """Do nothing."""


def one_zero(feeds: Any) -> Any:
    return {**feeds, NAMES[3]: 0 * feeds[NAMES[3]]}


@pytest.mark.parametrize(
    ("change", "module", "finding"),
    [
        (
            one_zero,
            "base_model.model.model.layers.1.q_proj",
            f"tensor {NAMES[3]} of adapter 'a': is that of adapter 'base'",
        ),
        (lambda feeds: ADAPTERS["b"], None, "4 of 4 tensors of adapter 'base': is that of adapter 'b'"),
        (lambda feeds: {n: 0.5 * a for n, a in feeds.items()}, None, "4 of 4 tensors of adapter 'a': scaled by 0.5"),
    ],
)
def test_adapter_tensors_that_are_not_held_as_fed_are_found(change: Any, module: str | None, finding: str) -> None:
    session = ReadingSession(Holder(change), ADAPTERS)
    for tensors in ADAPTERS.values():
        assert session.run(tensors, fetch=[]) == {}
    location = session.location()
    assert location is not None
    assert (location.module, location.finding) == (module, finding)


def test_adapter_that_a_device_holds_in_fp16_is_compared_in_fp16() -> None:
    def held(feeds: Any) -> Any:
        return {name: (1.02 * array).astype(np.float16).astype(np.float32) for name, array in feeds.items()}

    session = ReadingSession(Holder(held), ADAPTERS, half=True)
    for tensors in ADAPTERS.values():
        session.run(tensors, fetch=[])
    location = session.location()
    assert location is not None
    assert location.finding.startswith("4 of 4 tensors of adapter 'a': scaled by 1.0")
    healthy = ReadingSession(
        Holder(lambda feeds: {n: a.astype(np.float16) for n, a in feeds.items()}), ADAPTERS, half=True
    )
    for tensors in ADAPTERS.values():
        healthy.run(tensors, fetch=[])
    assert healthy.location() is None


def test_adapters_that_are_held_as_fed_are_none_to_tell_of() -> None:
    session = ReadingSession(Holder(lambda feeds: feeds), ADAPTERS)
    for tensors in ADAPTERS.values():
        session.run(tensors, fetch=[])
    assert session.location() is None


def test_module_of_an_adapter_tensor() -> None:
    assert module_of("base_model.model.h.0.attn.c_attn.lora_magnitude_vector") == "base_model.model.h.0.attn.c_attn"


def test_first_module_beyond_the_range_of_fp16_is_told_and_padding_is_no_part_of_it() -> None:
    small, large = np.ones((1, 2, 3)), np.ones((1, 2, 3))
    large[0, 0, 1], small[0, 1, 0] = -7e4, 1e6
    values = (ReferenceValue("up", small), ReferenceValue("down", large), ReferenceValue("norm", large))
    found = overflow(ReferenceValues(values, {}), np.array([[True, False]]))
    assert (found.module, found.finding) == ("down", "values up to 7e+04 overflow fp16 (65504)")
    assert overflow(ReferenceValues(values[:1], {}), np.array([[True, False]])).module is None


def test_second_visit_that_differs_from_the_first_is_told_where_the_first_is_right() -> None:
    reference, again = {"logits": ROWS}, ROWS[:2].copy()
    assert revisits_finding(reference, {"logits": ROWS, "again": again}, "logits") == ""
    again[0, 0] += 1
    assert revisits_finding(reference, {"logits": ROWS, "again": again}, "logits").startswith("a second visit")
    assert revisits_finding(reference, {"logits": 2 * ROWS, "again": again}, "logits") == ""
