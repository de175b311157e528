# SPDX-License-Identifier: Apache-2.0
"""Sparse vectors: drift of dot products, and the order of the strongest words."""

from __future__ import annotations

import numpy as np

from qeff_validate.comparison.sparse_metrics import dot_error, word_order


def test_dot_error_is_relative_to_the_lengths_of_both_rows() -> None:
    reference = np.array([[3.0, 4, 0], [0, 0, 2]])
    assert dot_error(reference, reference).value == 0
    drift = dot_error(reference, np.array([[3.0, 4, 1], [0, 0, 2]]))
    assert (drift.value, drift.worst) == (2 / (5 * 2), {"row": 0, "other": 1})


def test_nan_is_the_greatest_error() -> None:
    reference = np.array([[3.0, 4], [1, 2], [5, 1]])
    broken = reference.copy()
    broken[1, 0] = np.nan
    assert np.isnan(dot_error(reference, broken).value)


def test_row_of_zeros_that_stays_zeros_is_no_error() -> None:
    assert dot_error(np.zeros((2, 3)), np.zeros((2, 3))).value == 0
    assert dot_error(np.zeros((1, 3)), np.ones((1, 3))).value == np.inf


def test_strong_words_change_places_beyond_a_tie_only() -> None:
    reference = np.zeros((2, 100))
    reference[:, :40] = np.arange(40, 0, -1)
    other = reference.copy()
    other[1, 99] = 100  # a word that nobody said is the strongest
    order, overlap = word_order(reference, other, noise=1e-3)
    assert (order.value, order.worst["row"]) == (1, 1), "one word of the row overtakes others"
    assert overlap.value == (1 + 31 / 32) / 2
    swapped = reference.copy()
    swapped[0, [4, 5]] = swapped[0, [5, 4]]
    assert word_order(reference, swapped, noise=1e-3)[0].value == 1
    assert word_order(reference, swapped, noise=1e-1)[0].value == 0, "a gap of 1 is noise if noise is 1.5"
    weak = reference.copy()
    weak[0, [38, 39]] = weak[0, [39, 38]]
    assert word_order(reference, weak, noise=1e-3)[0].value == 0, "weak words do not count"
