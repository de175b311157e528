# SPDX-License-Identifier: Apache-2.0
"""Orders that follow from vectors decide their verdicts: of words, and of documents."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import NOISE_SHARE, Bound
from qeff_validate.models.classification.verdict import judge_scores
from qeff_validate.models.multi_vector.verdict import judge_multi_vector
from qeff_validate.models.sparse_embedding.verdict import judge_sparse
from qeff_validate.protocols import ComparisonContext

CONTEXT = ComparisonContext("fp16", {}, seed=0)


def failed(verdict: Any) -> set[str]:
    return {item.metric.name for item in verdict.metrics if not item.passed}


def test_words_that_change_places_fail_the_verdict() -> None:
    reference = np.zeros((3, 100), np.float32)
    reference[0, :40] = np.arange(40, 0, -1)
    reference[1, 50:90] = np.arange(1, 41)
    reference[2, ::3] = 30
    swapped = reference.copy()
    swapped[0, [4, 5]] = swapped[0, [5, 4]]
    inputs = SimpleNamespace(labels=["a", "b", "c"], similarity="dot")
    assert judge_sparse("words", {"words": reference}, {"words": reference}, inputs, CONTEXT).status == "pass"
    verdict = judge_sparse("words", {"words": reference}, {"words": swapped}, inputs, CONTEXT)
    assert verdict.status == "fail"
    assert "words.word_order" in failed(verdict)


def test_documents_that_change_places_fail_the_verdict() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 6))
    reference = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    swapped = np.concatenate([reference[:2], reference[5:8], reference[2:5]])
    scored = (np.ones(2, np.int64), np.ones(3, np.int64), np.ones(3, np.int64))
    texts = ["query", *"abcdefg"]
    inputs = SimpleNamespace(labels=texts, texts=texts, scored=scored, groups=(0, 1, 1))
    assert judge_multi_vector("out", {"out": reference}, {"out": reference}, inputs, CONTEXT).status == "pass"
    verdict = judge_multi_vector("out", {"out": reference}, {"out": swapped}, inputs, CONTEXT)
    assert verdict.status == "fail"
    assert "out.document_order" in failed(verdict)


OWN_BOUNDS = ComparisonContext(
    "fp16+mxfp6",
    {"rel_l2": 0.5, "cosine": 0.5, "norm_ratio": 0.5, "max_abs_rms": 5.0, "why": "weights of six bits"},
    seed=0,
)
"""Bounds of vectors alone, in a profile that has no bounds of the table."""


def test_dot_products_without_a_bound_are_not_settled() -> None:
    words = np.random.default_rng(0).uniform(0.5, 2, (3, 100)).astype(np.float32)
    inputs = SimpleNamespace(labels=["a", "b", "c"], similarity="dot")
    verdict = judge_sparse("words", {"words": words}, {"words": words}, inputs, OWN_BOUNDS)
    assert verdict.status == "inconclusive"
    assert "no sound bound for dot_error" in verdict.reason
    context = replace(OWN_BOUNDS, override={**OWN_BOUNDS.override, "dot_error": 0.5})
    assert judge_sparse("words", {"words": words}, {"words": words}, inputs, context).status == "pass"


def test_scores_without_a_bound_are_not_settled() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    texts = ["query", *"abcdefg"]
    scored = (np.ones(2, np.int64), np.ones(3, np.int64), np.ones(3, np.int64))
    inputs = SimpleNamespace(labels=texts, texts=texts, scored=scored, groups=(0, 1, 1))
    verdict = judge_multi_vector("out", {"out": vectors}, {"out": vectors}, inputs, OWN_BOUNDS)
    assert verdict.status == "inconclusive"
    assert "no sound bound for maxsim_error" in verdict.reason
    context = replace(OWN_BOUNDS, override={**OWN_BOUNDS.override, "maxsim_error": 0.5})
    assert judge_multi_vector("out", {"out": vectors}, {"out": vectors}, inputs, context).status == "pass"


def test_documents_keep_their_order_where_the_case_bounds_scores_alone() -> None:
    context = replace(OWN_BOUNDS, override={"score_error": 0.5, "why": "weights of six bits"})
    reference, swapped = np.float32([[3], [2.55], [-4]]), np.float32([[2.55], [3], [-4]])
    inputs = SimpleNamespace(labels=["a", "b", "c"], groups=(0, 0, 0))
    assert judge_scores("scores", {"scores": reference}, {"scores": reference}, inputs, context).status == "pass"
    verdict = judge_scores("scores", {"scores": reference}, {"scores": swapped}, inputs, context)
    assert failed(verdict) == {"scores.document_order"}


def test_noise_is_the_measured_one_unless_the_case_says_what_is_usual() -> None:
    assert Bound(0.5, "floor", "measured", floor=0.002).noise == 0.002
    assert Bound(0.5, "case", "a fraction of the words is pruned", floor=0.002).noise == 0.5 / NOISE_SHARE
    assert Bound(0.5, "fallback", "table").noise == 0.5 / NOISE_SHARE
