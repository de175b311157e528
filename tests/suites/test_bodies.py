# SPDX-License-Identifier: Apache-2.0
"""Every supported body, small and random, with two poolings and both exporters, and each kind with a head."""

from __future__ import annotations

from pathlib import Path

import pytest

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, load

CASES = load([Path(__file__).parents[2] / "configs" / "embedding.yaml"])
MEASURED = frozenset({"modernbert-cls", "jina_embeddings_v3-mean", "gpt2-last"})
"""Cases with measured bounds here; the others have the table's: measuring them all takes minutes of CI."""


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_body_agrees_with_hugging_face_on_ort_and_sim(case: Case, runner: Runner) -> None:
    if case.name not in MEASURED:
        case = case.model_copy(update={"tolerance": "table"})
    results = [runner.result(case, name) for name in ("ort", "sim")]
    assert [result.status for result in results] == ["pass", "pass"], [result.reason for result in results]
    assert all(result.compared >= 24 for result in results)


def test_each_body_has_two_poolings_and_both_exporters() -> None:
    pooled = [case for case in CASES if case.model == "embedding"]
    bodies = {case.source for case in pooled}
    assert len(bodies) == 15
    for body in bodies:
        assert len({case.options["pooling"] for case in pooled if case.source == body}) == 2
        assert {case.exporter for case in pooled if case.source == body} == {"dynamo", "torchscript"}
    assert {case.model for case in CASES if case not in pooled} == {
        "multi-vector", "reranker", "sequence-classification", "sparse-embedding"
    }  # fmt: skip
