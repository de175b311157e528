# SPDX-License-Identifier: Apache-2.0
"""Rank correlation against scipy, nDCG against scikit-learn, similarities against sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest
from bounds import close
from scipy.stats import spearmanr
from sentence_transformers import util
from sklearn.metrics import ndcg_score

from qeff_validate.comparison.similarity import similarity, similarity_noise
from qeff_validate.comparison.task_metrics import TaskScore, compare_ndcg, compare_spearman, ndcg, spearman
from qeff_validate.comparison.vector_metrics import neighbour_metrics

RNG = np.random.default_rng(0)
GRADES = RNG.integers(0, 4, size=60).astype(np.float64)
SCORES = np.round(GRADES + RNG.normal(size=60), 1)
"""With ties in both."""


@pytest.mark.numeric
def test_rank_correlation_is_that_of_scipy_also_where_places_are_counted_more_than_once() -> None:
    close(spearman(SCORES, GRADES), spearmanr(SCORES, GRADES).statistic, atol=1e-12)
    places = RNG.integers(60, size=60)
    counts = np.bincount(places, minlength=60).astype(np.float64)
    close(spearman(SCORES, GRADES, counts), spearmanr(SCORES[places], GRADES[places]).statistic, atol=1e-12)


@pytest.mark.numeric
@pytest.mark.parametrize("count", [4, 60])
def test_gain_is_that_of_scikit_learn_with_ties_and_with_fewer_documents_than_count(count: int) -> None:
    wanted = ndcg_score(GRADES[None, :count], SCORES[None, :count], k=10)
    close(ndcg(SCORES[:count], GRADES[:count]), wanted, atol=1e-12)
    tied = np.zeros(count)
    close(ndcg(tied, GRADES[:count]), ndcg_score(GRADES[None, :count], tied[None], k=10), atol=1e-12)


def test_equal_scores_have_no_difference_and_scores_that_lose_the_order_have_one() -> None:
    same = compare_spearman(SCORES, SCORES, GRADES, "set", seed=0)
    assert (same.value, same.low, same.high) == (same.reference, 0, 0)
    worse = compare_spearman(SCORES, RNG.normal(size=60), GRADES, "set", seed=0)
    assert worse.low < worse.value - worse.reference < worse.high < 0
    queries = [SCORES[:20], SCORES[20:40], SCORES[40:]]
    relevance = [GRADES[:20], GRADES[20:40], GRADES[40:]]
    reversed_order = compare_ndcg(queries, [-scores for scores in queries], relevance, "set", seed=0)
    assert reversed_order.low <= reversed_order.value - reversed_order.reference <= reversed_order.high < 0
    assert compare_ndcg(queries, queries, relevance, "set", seed=0).high == 0


def test_scores_that_are_not_numbers_reach_nothing() -> None:
    broken = np.where(np.arange(60) == 7, np.nan, SCORES)
    for score in (
        compare_spearman(SCORES, broken, GRADES, "set", seed=0),
        compare_ndcg([SCORES], [broken], [GRADES], "set", seed=0),
    ):
        assert np.isnan([score.value, score.low, score.high]).all()
        assert np.isfinite(score.reference)
        assert TaskScore.from_plain(score.plain()).count == score.count


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("cosine", util.cos_sim),
        ("dot", util.dot_score),
        ("euclidean", util.euclidean_sim),
        ("manhattan", util.manhattan_sim),
    ],
)
def test_similarities_are_those_of_sentence_transformers(name: str, oracle: object) -> None:
    vectors = RNG.normal(size=(5, 16))
    vectors[3] = 0
    close(similarity(name, vectors[0], vectors), oracle(vectors[:1], vectors)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_noise_of_the_stated_size_moves_no_neighbour_by_any_similarity_and_a_swap_does(name: str) -> None:
    vectors = RNG.normal(size=(40, 8)) * RNG.uniform(0.2, 5, size=(40, 1))
    error = RNG.normal(size=vectors.shape)
    error *= 0.0099 * np.linalg.norm(vectors, axis=1, keepdims=True) / np.linalg.norm(error, axis=1, keepdims=True)
    assert neighbour_metrics(vectors, vectors + error, noise=0.01, by=name)[0].value == 0
    moved = np.abs(similarity(name, vectors[0], vectors) - similarity(name, *(vectors + error)[[0]], vectors + error))
    assert (moved <= similarity_noise(name, vectors[0], vectors, 0.01) + 1e-12).all()
    swapped = vectors[[1, 0, *range(2, 40)]]
    assert neighbour_metrics(vectors, swapped, noise=0.01, by=name)[0].value > 0


def test_a_vector_that_grows_changes_the_order_by_dot_product_alone() -> None:
    vectors = RNG.normal(size=(10, 8))
    grown = vectors * np.where(np.arange(10) == 3, 3.0, 1.0)[:, None]
    assert neighbour_metrics(vectors, grown, noise=1e-3)[0].value == 0
    assert neighbour_metrics(vectors, grown, noise=1e-3, by="dot")[0].value > 0
