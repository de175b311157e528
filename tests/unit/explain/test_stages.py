# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import numpy as np
import pytest

from qeff_validate.explain import layers
from qeff_validate.explain.context import Clock, TimeIsUpError
from qeff_validate.explain.stages import guilty_stage, stage_shares

RNG = np.random.default_rng(0)


def test_shares_add_up_to_one_and_are_projections_on_the_whole_error() -> None:
    arrays = [RNG.standard_normal((3, 5)) for _ in range(5)]
    names = ["reference", "float32", "export", "optimizer", "runtime"]
    shares = stage_shares(list(zip(names, arrays, strict=True)))
    assert [stage.name for stage in shares] == names[1:]
    assert sum(stage.share for stage in shares) == pytest.approx(1)
    total = (arrays[-1] - arrays[0]).ravel()
    for place, stage in enumerate(shares):
        step = (arrays[place + 1] - arrays[place]).ravel()
        assert stage.share == pytest.approx(step @ total / (total @ total))
        assert stage.error == pytest.approx(np.linalg.norm(step) / np.linalg.norm(arrays[0]))


def test_stages_that_cancel_have_shares_outside_of_zero_and_one() -> None:
    zero, far, near = np.zeros(1), np.array([10.0]), np.array([1.0])
    shares = stage_shares([("", zero), ("export", far), ("runtime", near)])
    assert [stage.share for stage in shares] == [10.0, -9.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_first_stage_that_is_not_finite_has_all_of_the_error(bad: float) -> None:
    good, wrong = np.ones(2), np.array([1.0, bad])
    shares = stage_shares([("", good), ("float32", good), ("export", wrong), ("runtime", wrong)])
    assert [stage.share for stage in shares] == [0.0, 1.0, 0.0]
    assert guilty_stage(shares) == "export"


def test_no_stage_is_named_where_none_makes_half_or_float32_makes_it() -> None:
    zero, one, two, three = (np.eye(3)[:n].sum(0) for n in range(4))
    assert guilty_stage(stage_shares([("", zero), ("export", one), ("optimizer", two), ("runtime", three)])) is None
    assert guilty_stage(stage_shares([("", zero), ("float32", one), ("runtime", one)])) is None
    assert guilty_stage(stage_shares([("", zero), ("export", one), ("runtime", one)])) == "export"


def test_stage_within_what_is_expected_of_it_is_not_named_if_another_makes_more() -> None:
    zero, fault, rounded = np.zeros(2), np.array([1.0, 0.0]), np.array([1.0, 2.0])
    shares = stage_shares([("", np.ones(2)), ("float32", zero), ("export", fault), ("precision", rounded)])
    blamed = [stage for stage in shares if stage.name != "float32"]
    assert guilty_stage(blamed) == "precision"
    assert guilty_stage(blamed, {"precision": 2.0}) == "export"
    assert guilty_stage(blamed, {"precision": 2.0, "export": 1.0}) is None


def test_equal_outputs_have_no_share() -> None:
    same = np.ones(3)
    assert [stage.share for stage in stage_shares([("", same), ("export", same)])] == [0.0]


@pytest.mark.parametrize(
    ("ratios", "place"),
    [
        ([1.0, 9.0, 2.0], 1),
        ([1.0, 7.0, 2.0], None),  # below the factor of 8
        ([9.0, 200.0, 2000.0, 50.0], 1),  # the first that is not far below the greatest
        ([9.0, 20.0, np.inf, 3.0], 0),  # beside a value that is not finite every divergent one counts
    ],
)
def test_first_layer_near_the_worst_is_named(ratios: list[float], place: int | None) -> None:
    assert layers.first_divergent(ratios, 8.0) == place


def test_time_that_is_up_is_told() -> None:
    clock = Clock(60.0, time.monotonic())
    clock.check()
    with pytest.raises(TimeIsUpError, match="the time limit of 60 s has passed"):
        Clock(60.0, time.monotonic() - 61).check()
