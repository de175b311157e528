# SPDX-License-Identifier: Apache-2.0
"""Statistics of timings, as pure functions of arrays: no clock is read here.

Timings have three levels. A *launch* is a process that opens the program and times it; a *round* is a short time
within it, in which baseline and candidate run in the order A B B A; a *shot* is one timed run. Shots of one round share
the state of the machine, rounds of one launch share memory layout and thread placement. So the bootstrap draws launches
and, within each, rounds; shots are never drawn one by one, because they are no independent observations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qeff_validate.errors import IncomparableError

Seconds: TypeAlias = NDArray[np.float64]
"""Durations, float64, in seconds."""

CONFIDENCE = 0.99
"""Of each one-sided bound of an interval."""

LEAST_LAUNCHES = 3
"""With fewer, nothing tells the difference between two programs from that between two launches of one."""

DRAWS = 2000
"""Of the bootstrap: 20 of them lie beyond each bound."""

ROUND_QUANTILE = 0.1
"""Of the shots of a round, by which programs are compared: what else runs makes shots slower and never faster.

With two thirds of the processors used by others, log ratios of a program to itself had a standard deviation over
launches of 0.0017 by this quantile, 0.0073 by the median and 0.042 by the mean (docs/timing-gate.md). What only some
shots show is left to budgets for the 95th and 99th percentile.
"""

MOST_VALUES = 4_000_000
"""Values that the bootstrap of a quantile holds at a time: 32 MB."""

CHANGE_PENALTY = 12.0
"""How many times the noise variance a change point must explain, times ln n: 1,000 constant series have none."""

OUTLIER = 4.0
"""Deviations from the median, in robust standard deviations, beyond which a shot is cut to that limit."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with one-sided bounds, each at `CONFIDENCE`; log ratios, or seconds.

    Examples:
        >>> Interval(0.0, 0.01, 0.02).percent()
        '+1.0 % (+0.0 % to +2.0 %)'
    """

    low: float
    estimate: float
    high: float

    def percent(self) -> str:
        """Return a log ratio as percent of change."""
        estimate, low, high = (f"{math.expm1(value):+.1%}".replace("%", " %") for value in self._ordered())
        return f"{estimate} ({low} to {high})"

    def _ordered(self) -> tuple[float, float, float]:
        return self.estimate, self.low, self.high


@dataclass(frozen=True, slots=True)
class TimingVerdict:
    """What a comparison of timings says.

    Attributes:
        status: ``fail`` only if the bound of the interval lies beyond the limit, on a machine without other load.
        reason: one clause with the numbers.
        improved: it is faster by more than the limit, with the same confidence: time for a new baseline.
    """

    status: Literal["pass", "fail", "inconclusive"]
    reason: str
    improved: bool = False


def warmup_length(seconds: Seconds) -> int:
    """Return how many of the first shots are warm-up: those before the last change point to a faster level.

    Args:
        seconds: shots in order, ``[n]``.

    Returns:
        0 to n // 2. If the series is still getting faster after its middle, n: it has not settled.

    Examples:
        >>> warmup_length(np.array([9.0, 5.0, 5.0, *[1.0, 1.01, 0.99, 1.0] * 8]))
        3
    """
    start = 0
    while start < len(seconds):
        change = _change_point(np.log(seconds[start:]))
        if change == 0:
            break
        start += change
    return start if start <= len(seconds) // 2 else len(seconds)


def _change_point(values: NDArray[np.float64]) -> int:
    """Return where the mean falls most clearly, as the length of the first segment; 0 if nowhere clearly."""
    count = len(values)
    if count < 4:
        return 0
    deviation = _robust_deviation(values)
    # a single slow shot is no level, so it must not decide; the very first one may be alone, and is judged below
    middle = float(np.median(values))
    clipped = np.clip(values, middle - OUTLIER * deviation, middle + OUTLIER * deviation)
    lengths = np.arange(1, count)
    before = np.cumsum(clipped)[:-1] / lengths
    after = (clipped.sum() - np.cumsum(clipped)[:-1]) / (count - lengths)
    gain = np.where(before > after, (before - after) ** 2 * lengths * (count - lengths) / count, 0.0)
    best = int(np.argmax(gain))
    if gain[best] > CHANGE_PENALTY * deviation**2 * math.log(count):
        return best + 1
    return 1 if values[0] > middle + 2 * OUTLIER * deviation else 0


def _robust_deviation(values: NDArray[np.float64]) -> float:
    """Return the standard deviation of the noise, from differences of neighbours, which a change of level hardly moves.

    The floor of 0.5 % keeps a clock's resolution from making constant series look like steps.
    """
    differences = np.abs(np.diff(values))
    return max(float(np.median(differences)) / 0.6745 / math.sqrt(2), 0.005)


def round_levels(seconds: Seconds) -> NDArray[np.float64]:
    """Return the log of the `ROUND_QUANTILE` of each round's shots, ``[launches, rounds]``.

    Args:
        seconds: ``[launches, rounds, shots]``.
    """
    levels: NDArray[np.float64] = np.log(np.quantile(seconds, ROUND_QUANTILE, axis=2))
    return levels


def log_ratios(baseline: Seconds, candidate: Seconds) -> NDArray[np.float64]:
    """Return the log ratio of each round's level, candidate over baseline, ``[launches, rounds]``.

    Args:
        baseline: ``[launches, rounds, shots]``.
        candidate: as ``baseline``, timed within the same rounds; the number of shots may differ.

    Raises:
        IncomparableError: the rounds are not paired.
    """
    if baseline.shape[:2] != candidate.shape[:2]:
        raise IncomparableError(f"rounds are not paired: {baseline.shape[:2]} and {candidate.shape[:2]}")
    return round_levels(candidate) - round_levels(baseline)


def median_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the median of paired log ratios with its bounds, from a bootstrap over launches and their rounds.

    Three to seven launches make it strict: the bound is about the launch that shows least, so that one launch in a fast
    memory layout cannot fail a program.

    Args:
        values: ``[launches, rounds]``.
        seed: of the bootstrap.

    Raises:
        IncomparableError: fewer launches than `LEAST_LAUNCHES`, or values that are not finite.

    Examples:
        >>> interval = median_interval(np.full((3, 10), 0.05))
        >>> interval.low == interval.estimate == interval.high == 0.05
        True
    """
    _check(values)
    medians = np.median(_drawn(values, np.random.default_rng(seed), DRAWS).reshape(DRAWS, -1), axis=1)
    return _interval(float(np.median(values)), medians)


def quantile_interval(seconds: Seconds, quantile: float, seed: int = 0) -> Interval:
    """Return a quantile of all shots with its bounds, from a bootstrap over launches and their rounds.

    Args:
        seconds: ``[launches, rounds, shots]``.
        quantile: 0.5 for the median, 0.95, 0.99.
        seed: of the bootstrap.

    Raises:
        IncomparableError: fewer launches than `LEAST_LAUNCHES`, or values that are not finite.
    """
    _check(seconds)
    generator, quantiles, left = np.random.default_rng(seed), [], DRAWS
    while left > 0:
        draws = min(left, max(1, MOST_VALUES // seconds.size))
        shots = _drawn(seconds, generator, draws).reshape(draws, -1)
        quantiles.append(np.quantile(shots, quantile, axis=1))
        left -= draws
    return _interval(float(np.quantile(seconds, quantile)), np.concatenate(quantiles))


def least_shots(quantile: float) -> int:
    """Return how many shots a quantile needs to be more than the worst shot: three beyond it.

    Examples:
        >>> [least_shots(quantile) for quantile in (0.5, 0.95, 0.99)]
        [6, 60, 300]
    """
    return round(3 / (1 - quantile))


def normalised_levels(seconds: Seconds, kernel: Seconds) -> NDArray[np.float64]:
    """Return each round's level relative to a fixed kernel that was timed beside it.

    Args:
        seconds: ``[launches, rounds, shots]``.
        kernel: of the same rounds, ``[launches, rounds]``.

    Returns:
        ``[launches, rounds]``: how many kernels long a shot is, as a logarithm.

    Raises:
        IncomparableError: the kernel was not timed in each round.
    """
    if seconds.shape[:2] != kernel.shape:
        raise IncomparableError(f"the kernel has rounds {kernel.shape}, the timings {seconds.shape[:2]}")
    return round_levels(seconds) - np.log(kernel)


def unpaired_interval(baseline: NDArray[np.float64], candidate: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the difference of medians of log times of two sessions, from independent bootstraps of both.

    Args:
        baseline: ``[launches, rounds]``, stored.
        candidate: ``[launches, rounds]``, of now.
        seed: of the bootstrap.

    Raises:
        IncomparableError: fewer launches than `LEAST_LAUNCHES`, or values that are not finite.
    """
    _check(baseline)
    _check(candidate)
    generator = np.random.default_rng(seed)
    both = [np.median(_drawn(values, generator, DRAWS).reshape(DRAWS, -1), axis=1) for values in (candidate, baseline)]
    return _interval(float(np.median(candidate) - np.median(baseline)), both[0] - both[1])


def judge_slowdown(control: Interval, ratio: Interval, limit: float, disturbed: str = "") -> TimingVerdict:
    """Judge a slowdown against its limit.

    Args:
        control: log ratio of the baseline to itself, measured in the same way just before.
        ratio: log ratio of candidate to baseline.
        limit: accepted slowdown, 0.05 for 5 %.
        disturbed: what else kept the machine busy; empty: nothing.

    Examples:
        >>> quiet = Interval(-0.01, 0.0, 0.01)
        >>> judge_slowdown(quiet, Interval(0.08, 0.1, 0.12), 0.05).status
        'fail'
        >>> judge_slowdown(Interval(-0.01, 0.0, 0.09), Interval(0.08, 0.1, 0.12), 0.05).status
        'inconclusive'
    """
    bound, allowed = math.log1p(limit), f"{limit * 100:.3g} %"
    if max(-control.low, control.high) > bound:
        reason = (
            f"the baseline differs from itself by {control.percent()}, which no limit of {allowed} can be told from"
        )
        return TimingVerdict("inconclusive", reason)
    measured = f"{ratio.percent()} of the baseline's time, limit {allowed}"
    if ratio.low > bound:
        if disturbed:
            return TimingVerdict("inconclusive", f"{measured}, but the machine was not quiet: {disturbed}")
        return TimingVerdict("fail", f"slower: {measured}")
    if ratio.estimate > bound:
        return TimingVerdict("inconclusive", f"perhaps slower: {measured}; {disturbed or 'more launches would tell'}")
    return TimingVerdict("pass", measured, improved=ratio.high < -bound)


def judge_budget(interval: Interval, budget: float, disturbed: str = "") -> TimingVerdict:
    """Judge seconds, or any other cost, against a budget in the same unit.

    Args:
        interval: of the quantile.
        budget: the greatest accepted value.
        disturbed: what else kept the machine busy; empty: nothing.
    """
    measured = f"{interval.estimate:.4g} ({interval.low:.4g} to {interval.high:.4g}), budget {budget:.4g}"
    if interval.low > budget:
        if disturbed:
            return TimingVerdict("inconclusive", f"{measured}, but the machine was not quiet: {disturbed}")
        return TimingVerdict("fail", f"over budget: {measured}")
    if interval.estimate > budget:
        return TimingVerdict(
            "inconclusive", f"perhaps over budget: {measured}; {disturbed or 'more launches would tell'}"
        )
    return TimingVerdict("pass", measured)


def _drawn(values: NDArray[np.float64], generator: np.random.Generator, draws: int) -> NDArray[np.float64]:
    """Return ``[draws, launches, rounds, …]``: launches drawn with replacement, and rounds within each drawn launch."""
    launches, rounds = values.shape[:2]
    chosen = generator.integers(launches, size=(draws, launches, 1))
    within = generator.integers(rounds, size=(draws, launches, rounds))
    drawn: NDArray[np.float64] = values[chosen, within]
    return drawn


def _check(values: NDArray[np.float64]) -> None:
    if len(values) < LEAST_LAUNCHES:
        raise IncomparableError(f"{len(values)} launches were timed, and at least {LEAST_LAUNCHES} are needed")
    if values.size == 0 or not np.isfinite(values).all():
        raise IncomparableError("timings are missing or not finite")


def _interval(estimate: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [1 - CONFIDENCE, CONFIDENCE])
    return Interval(float(min(low, estimate)), estimate, float(max(high, estimate)))
