# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qeff_validate.comparison.decisive_rows import EXTREMES, MOST, decisive_rows, expected_maximum, worst_of_all

LENGTHS = [3, 0, *(5 + at % 40 for at in range(300)), 1, 64]
SENSITIVITY = list(np.random.default_rng(0).random(len(LENGTHS)))


def test_few_rows_are_all_measured() -> None:
    choice = decisive_rows([4, 0, *[9] * (MOST - 1)], (), seed=0)
    assert choice.rows == tuple(range(MOST + 1))
    assert (choice.drawn, choice.left_out) == ((), 0)


def test_of_many_rows_the_extremes_and_a_sample_are_measured() -> None:
    choice = decisive_rows(LENGTHS, SENSITIVITY, seed=0)
    by_sensitivity = sorted((row for row, length in enumerate(LENGTHS) if length), key=SENSITIVITY.__getitem__)
    assert {0, 302, 303, 1} <= set(choice.rows), "the shortest, the longest, and the row without a token"
    assert set(by_sensitivity[-EXTREMES:]) <= set(choice.rows)
    assert len(choice.rows) == MOST + 1
    assert choice.left_out == len(LENGTHS) - len(choice.rows)
    assert set(choice.drawn) < set(choice.rows)
    assert choice == decisive_rows(LENGTHS, SENSITIVITY, seed=0)
    assert choice != decisive_rows(LENGTHS, SENSITIVITY, seed=1)
    thirds = np.digitize([LENGTHS[row] for row in choice.drawn], [18, 31])
    assert np.bincount(thirds, minlength=3).min() >= 6, "drawn from all lengths"


@given(st.lists(st.integers(0, 70), min_size=1, max_size=400), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_any_lengths_give_distinct_rows_and_no_more_than_are_allowed(lengths: list[int], seed: int) -> None:
    choice = decisive_rows(lengths, lengths, seed)
    filled = [row for row in choice.rows if lengths[row]]
    assert list(choice.rows) == sorted(set(choice.rows))
    assert len(filled) + choice.left_out == sum(length > 0 for length in lengths)
    assert len(filled) <= MOST
    assert set(choice.drawn) <= set(filled)


@pytest.mark.parametrize("count", [3, 10, 48, 1000])
def test_the_expected_maximum_is_that_of_drawn_numbers(count: int) -> None:
    drawn = np.random.default_rng(1).normal(size=(4000, count)).max(axis=1)
    assert expected_maximum(count) == pytest.approx(drawn.mean(), rel=0.05)


@pytest.mark.parametrize("left_out", [100, 2000])
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6])
def test_the_worst_of_all_rows_is_found_from_some(left_out: int, spread: float) -> None:
    """Held out: log-normal errors of rows, each run of which differs; the limit must not be far below or above."""
    random = np.random.default_rng(2)
    ratios = []
    for _ in range(40):
        rows = random.normal(size=MOST + left_out) * spread
        errors = np.exp(rows + random.normal(size=(8, rows.size)) * spread)
        some = errors[:, :MOST]
        ratios.append(worst_of_all(some.max(axis=1), some[:, 12:], left_out).mean() / errors.max(axis=1).mean())
    assert 0.85 < np.median(ratios) < 1.2
    assert np.min(ratios) > 1 / 3, "what the factor of a bound (2 or 3) makes good"
    plain = errors[:, :MOST].max(axis=1).mean() / errors.max(axis=1).mean()
    assert plain < np.median(ratios), "the correction is needed"


@pytest.mark.parametrize("at", [0, 35])
def test_a_row_that_is_not_finite_makes_the_worst_not_finite(at: int) -> None:
    drawn = np.ones((8, 36))
    drawn[3, at] = np.nan
    assert np.isnan(worst_of_all(np.ones(8), drawn, 100)).all()
    assert np.isnan(worst_of_all(np.array([1.0, np.nan] * 4), np.ones((8, 36)), 0)).sum() == 4
