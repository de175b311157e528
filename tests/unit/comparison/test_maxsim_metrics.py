# SPDX-License-Identifier: Apache-2.0
"""MaxSim by loops over vectors, its errors, and the order of documents."""

from __future__ import annotations

import numpy as np
import pytest
from bounds import close

from qeff_validate.comparison.maxsim_metrics import Texts, maxsim, maxsim_errors, maxsim_metrics

SCORED = (np.array([1, 1]), np.array([1, 0, 1, 1]), np.array([0]), np.array([1, 1, 1]))
TEXTS = Texts.of(SCORED, (0, 1, 1, 1))


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 6))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_texts_without_a_vector_that_counts_are_left_out() -> None:
    assert Texts(((0, 0, 2),), ((1, 2, 5), (3, 5, 8))) == TEXTS


def test_without_queries_all_texts_are_both() -> None:
    alone = Texts.of((np.array([1, 1]),), (1,))
    assert alone.queries == alone.documents == ((0, 0, 2),)


@pytest.mark.numeric
def test_score_is_the_mean_of_the_greatest_dot_products() -> None:
    vectors = unit(8)
    for column, document in enumerate((vectors[2:5], vectors[5:8])):
        wanted = sum(max(float(np.float64(query) @ np.float64(one)) for one in document) for query in vectors[:2]) / 2
        close(maxsim(vectors, TEXTS)[0, column], wanted, rtol=1e-12)


def test_nan_is_the_greatest_error() -> None:
    broken = unit(8)
    broken[6, 0] = np.nan
    assert np.isnan(maxsim_errors(unit(8), broken, TEXTS).max())
    assert not np.isnan(maxsim_errors(unit(8), broken, TEXTS)[0, 0]), "the other document has a score"


def test_documents_that_change_places_are_counted_beyond_a_tie() -> None:
    reference = unit(8)
    swapped = np.concatenate([reference[:2], reference[5:8], reference[2:5]])
    error, order = maxsim_metrics(reference, swapped, TEXTS, noise=1e-3)
    assert error.value == abs(np.diff(maxsim(reference, TEXTS)[0])[0]) > 0.01
    assert order.value == 1
    assert maxsim_metrics(reference, swapped, TEXTS, noise=0.3)[1].value == 0, "a gap of 1.4 is noise"
