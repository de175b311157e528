# SPDX-License-Identifier: Apache-2.0
"""Cases of each kind with a head from configs/heads.yaml: the reference is transformers' model; ort and sim agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import within

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, load

CASES = {case.name: case for case in load([Path(__file__).parents[2] / "configs" / "heads.yaml"])}
TESTED = ("roberta-reranker", "xlm-roberta-reranker", "bert-splade", "bert-colbert", "bert-classifier")
"""The cheapest of each kind, and one with three labels."""

LIMIT = 5e-6
"""Relative L2 between two float32 implementations of one model."""


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


def expected(case: Case, model: Any, inputs: Any, row: int, head: Any) -> Any:
    """Return what transformers' model gives for a row, with what the kind does behind it."""
    feeds = {"input_ids": inputs.ids[row], **({"token_type_ids": inputs.types[row]} if inputs.types else {})}
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(values[None]) for name, values in feeds.items()})
    if case.model == "multi-vector":
        weight = head.layers[0].weight.detach().double().numpy()
        vectors = output.last_hidden_state[0].double().numpy() @ weight.T
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    logits = output.logits[0].double().numpy()
    if case.model == "sparse-embedding":
        return np.log1p(np.maximum(logits, 0)).max(0)
    return 1 / (1 + np.exp(-logits)) if case.model == "reranker" and logits.size == 1 else logits


@pytest.mark.numeric
@pytest.mark.parametrize("name", TESTED)
def test_a_kind_with_a_head_gives_what_transformers_does_on_ort_and_sim(name: str, runner: Runner) -> None:
    case = CASES[name].model_copy(update={"tolerance": "table"})
    pipeline = runner.pipeline(case)
    (values,), inputs, model = pipeline.reference().values(), pipeline.inputs(), pipeline.model()
    rows = [row for row, ids in enumerate(inputs.ids) if ids.size]
    wanted = [expected(case, model.original(), inputs, row, model.head()) for row in rows]
    if case.model == "multi-vector":
        stacked, found = np.concatenate(wanted), values
        nearest = (values @ stacked.T).argmax(1)  # the words of a document's skip-list have none
        assert len(set(nearest)) > len(values) / 2
        wanted_rows = stacked[nearest]
    else:
        wanted_rows, found = np.stack(wanted), values[rows]
    within(np.linalg.norm(found - wanted_rows, axis=-1) / np.linalg.norm(wanted_rows, axis=-1), LIMIT)
    results = [runner.result(case, runtime) for runtime in ("ort", "sim")]
    assert [result.status for result in results] == ["pass", "pass"], [result.reason for result in results]


def test_each_kind_with_a_head_is_among_them() -> None:
    assert {CASES[name].model for name in TESTED} == {case.model for case in CASES.values()}
