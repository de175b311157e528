# SPDX-License-Identifier: Apache-2.0
"""The timing gate on synthetic noise with seeds; nothing here reads a clock, so nothing can flake."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from qeff_validate.comparison.timing import (
    Interval,
    judge_budget,
    judge_slowdown,
    least_shots,
    log_ratios,
    median_interval,
    normalised_levels,
    quantile_interval,
    unpaired_interval,
    warmup_length,
)
from qeff_validate.errors import IncomparableError

LIMIT = 0.02
LAUNCHES, ROUNDS, SHOTS = 5, 15, 6


def timed(
    random: np.random.Generator, slowdown: float = 0.0, *, launch: float = 0.004, loaded: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Timings of a baseline and a candidate, interleaved, with noise of launches, rounds and shots, and drift.

    Args:
        random: generator.
        slowdown: of the candidate.
        launch: standard deviation of a program's log speed from launch to launch.
        loaded: other processes delay a third of the rounds, and many shots.
    """
    size = (LAUNCHES, ROUNDS, SHOTS)
    drift = np.cumsum(random.normal(0, 0.01, (LAUNCHES, ROUNDS, 1)), axis=1)
    busy = random.exponential(0.5, (LAUNCHES, ROUNDS, 1)) * (random.random((LAUNCHES, ROUNDS, 1)) < 0.33) * loaded
    sides = []
    for effect in (0.0, math.log1p(slowdown)):
        log_speed = random.normal(0, launch, (LAUNCHES, 1, 1)) + random.normal(0, 0.008, (LAUNCHES, ROUNDS, 1))
        shots = random.normal(0, 0.01, size) + random.exponential(0.02, size)
        shots += random.exponential(1.0, size) * (random.random(size) < (0.2 if loaded else 0.01))
        sides.append(0.001 * np.exp(effect + drift + busy + log_speed + shots))
    return sides[0], sides[1]


def status(random: np.random.Generator, slowdown: float = 0.0, *, loaded: bool = False) -> str:
    control = median_interval(log_ratios(*timed(random, loaded=loaded)))
    return judge_slowdown(control, median_interval(log_ratios(*timed(random, slowdown, loaded=loaded))), LIMIT).status


def test_equal_programs_raise_at_most_one_alarm_in_a_hundred() -> None:
    random = np.random.default_rng(0)
    states = [status(random, loaded=at % 3 == 0) for at in range(300)]
    assert states.count("fail") <= 3
    assert states.count("pass") >= 200


@pytest.mark.parametrize(("slowdown", "share"), [(0.1, 0.95), (0.05, 0.6)])
def test_slowdowns_are_found(slowdown: float, share: float) -> None:
    random = np.random.default_rng(1)
    assert [status(random, slowdown) for _ in range(60)].count("fail") >= 60 * share


def test_improvement_is_no_failure_and_is_told() -> None:
    random = np.random.default_rng(2)
    quiet = Interval(-0.001, 0.0, 0.001)
    verdict = judge_slowdown(quiet, median_interval(log_ratios(*timed(random, -0.2))), LIMIT)
    assert (verdict.status, verdict.improved) == ("pass", True)
    assert not judge_slowdown(quiet, quiet, LIMIT).improved


def test_shots_of_one_launch_are_no_independent_observations() -> None:
    """One launch in a slow memory layout: a bootstrap over single shots would be sure of a slowdown."""
    ratios = np.full((3, 40), 0.0) + np.random.default_rng(3).normal(0, 0.002, (3, 40))
    ratios[:2] += 0.05
    assert median_interval(ratios).low < 0.01
    assert (
        np.quantile([np.median(np.random.default_rng(s).choice(ratios.ravel(), 120)) for s in range(300)], 0.01) > 0.03
    )


def test_few_launches_and_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(IncomparableError, match="2 launches"):
        median_interval(np.zeros((2, 50)))
    with pytest.raises(IncomparableError, match="not finite"):
        quantile_interval(np.full((3, 2, 2), np.nan), 0.5)
    with pytest.raises(IncomparableError, match="not paired"):
        log_ratios(np.ones((3, 4, 2)), np.ones((3, 5, 2)))


def test_baseline_that_differs_from_itself_decides_nothing() -> None:
    verdict = judge_slowdown(Interval(-0.03, 0.0, 0.01), Interval(0.2, 0.3, 0.4), LIMIT)
    assert verdict.status == "inconclusive"
    assert "differs from itself by +0.0 % (-3.0 % to +1.0 %)" in verdict.reason


def test_loaded_machine_is_inconclusive_and_never_red() -> None:
    quiet, slow = Interval(-0.001, 0.0, 0.001), Interval(0.2, 0.3, 0.4)
    assert judge_slowdown(quiet, slow, LIMIT).status == "fail"
    verdict = judge_slowdown(quiet, slow, LIMIT, "make (190 % of a CPU)")
    assert verdict.status == "inconclusive"
    assert "make (190 % of a CPU)" in verdict.reason
    over = Interval(31.0, 32.0, 33.0)
    assert judge_budget(over, 30.0).status == "fail"
    assert judge_budget(over, 30.0, "make").status == "inconclusive"
    assert judge_budget(Interval(1.0, 2.0, 3.0), 30.0, "make").status == "pass"


def test_estimate_beyond_the_limit_without_proof_is_inconclusive() -> None:
    assert judge_slowdown(Interval(0.0, 0.0, 0.0), Interval(0.01, 0.03, 0.05), LIMIT).status == "inconclusive"
    assert judge_budget(Interval(29.0, 31.0, 33.0), 30.0).status == "inconclusive"
    assert judge_budget(Interval(28.0, 29.0, 33.0), 30.0).status == "pass"


def test_shots_that_others_delay_do_not_count() -> None:
    baseline = np.full((3, 5, 20), 1.0)
    candidate = np.full((3, 5, 20), 1.1)
    candidate[:, :, ::2] = 4.0
    assert log_ratios(baseline, candidate) == pytest.approx(math.log(1.1))


def test_drift_and_load_that_both_sides_see_cancel() -> None:
    baseline, candidate = timed(np.random.default_rng(4))
    drifting = np.linspace(1, 3, ROUNDS)[None, :, None]
    assert log_ratios(baseline * drifting, candidate * drifting) == pytest.approx(log_ratios(baseline, candidate))


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_interval_of_a_quantile_holds_the_true_one(quantile: float) -> None:
    random = np.random.default_rng(5)
    held = 0
    for _ in range(30):
        seconds = random.exponential(1.0, (5, 10, 5)) + random.normal(5, 0.2, (5, 1, 1))
        draws = random.exponential(1.0, 20_000) + random.normal(5, 0.2, 20_000)
        interval = quantile_interval(seconds, quantile)
        held += interval.low <= float(np.quantile(draws, quantile)) <= interval.high
    assert held >= 27


def test_interval_narrows_to_the_value_where_there_is_no_noise() -> None:
    interval = quantile_interval(np.full((3, 4, 5), 0.25), 0.95)
    assert (interval.low, interval.estimate, interval.high) == (0.25, 0.25, 0.25)
    assert least_shots(0.95) == 60


# --- warm-up ---------------------------------------------------------------------------------------


def steady(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.exp(np.random.default_rng(seed).normal(0, 0.02, count))


@pytest.mark.parametrize("seed", range(20))
def test_warm_up_ends_at_the_change(seed: int) -> None:
    assert (
        warmup_length(np.concatenate([[40.0], 3 * steady(6, seed + 50), 1.3 * steady(8, seed + 99), steady(60, seed)]))
        == 15
    )


def test_constant_series_has_no_warm_up() -> None:
    lengths = [warmup_length(steady(60, seed)) for seed in range(300)]
    assert sum(length > 0 for length in lengths) <= 9
    assert warmup_length(np.full(50, 0.001)) == 0


def test_slow_shots_in_between_are_no_warm_up() -> None:
    seconds = steady(60)
    seconds[[10, 25, 41]] = 30.0
    assert warmup_length(seconds) == 0


def test_only_the_first_shot_may_be_slow() -> None:
    seconds = steady(40)
    seconds[0] = 25.0
    assert warmup_length(seconds) == 1


def test_series_that_gets_slower_has_no_warm_up() -> None:
    assert warmup_length(np.concatenate([steady(20), 2 * steady(20, 1)])) == 0


def test_series_that_is_still_getting_faster_has_not_settled() -> None:
    assert warmup_length(np.concatenate([2 * steady(30), steady(20, 1)])) == 50


# --- stored baselines ------------------------------------------------------------------------------


def test_kernel_beside_the_rounds_cancels_the_speed_of_the_machine() -> None:
    random = np.random.default_rng(6)
    kernel = np.exp(random.normal(0, 0.01, (5, 20)))
    seconds = kernel[:, :, None] * np.exp(random.normal(0, 0.01, (5, 20, 6)))
    slower = 1.5 * kernel  # the whole machine is
    before = normalised_levels(seconds, kernel)
    after = normalised_levels(1.5 * seconds, slower)
    interval = unpaired_interval(before, after)
    assert interval.low <= 0.0 <= interval.high
    found = unpaired_interval(before, normalised_levels(1.5 * 1.1 * seconds, slower))
    assert found.low > 0.08
    with pytest.raises(IncomparableError, match="kernel"):
        normalised_levels(seconds, kernel[:, :3])
