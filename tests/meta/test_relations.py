# SPDX-License-Identifier: Apache-2.0
"""Each metamorphic relation passes on a healthy session and fails on one that breaks just it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import check
from qeff_validate.models.embedding.relations import RELATIONS
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Runtime, Session, runtime
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Tensors

Damage = Callable[[Tensors, np.ndarray], np.ndarray]


class Damaged:
    """A session whose output is changed by what was fed."""

    def __init__(self, session: Session, damage: Damage) -> None:
        self._session, self._damage = session, damage
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        output = self._session.run(feeds, fetch=fetch)["output"]
        return {"output": (output * (1 + 0.01 * self._damage(feeds, output))).astype(np.float32)}

    def reset(self) -> None:
        self._session.reset()


def column(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)[:, None]


DAMAGE: dict[str, Damage] = {
    "duplicates": lambda feeds, _: column(np.arange(len(feeds["input_ids"])) % 2),
    "garbage_in_padding": lambda feeds, _: column(np.where(feeds["attention_mask"] == 0, feeds["input_ids"], 0).sum(1)),
    "greater_bucket": lambda feeds, out: np.full_like(out, feeds["input_ids"].shape[1] > 48),
    "padding_sides": lambda feeds, _: column(feeds["attention_mask"][:, 0] == 0),
    "permutation": lambda feeds, _: column(feeds["attention_mask"].sum(1) < np.roll(feeds["attention_mask"].sum(1), 1)),
    "single_row": lambda feeds, out: np.full_like(out, len(np.unique(feeds["input_ids"], axis=0)) > 1),
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    case = Case(
        name="relations",
        source="random:llama",
        options={"pooling": "last", "seq_len": [48, 64]},
        exporter="torchscript",
    )
    return Pipeline(case, check(case), Store(), Silent())


def related(pipeline: Pipeline, adapter: Any, name: str) -> Any:
    typed: Runtime = adapter
    return pipeline.relation(typed, name)


def test_a_damage_is_known_for_every_relation() -> None:
    assert sorted(DAMAGE) == sorted(RELATIONS)


@pytest.mark.parametrize("name", sorted(RELATIONS))
def test_a_healthy_session_keeps_the_relation(name: str, pipeline: Pipeline) -> None:
    result = related(pipeline, runtime("ort"), name)
    assert result.status == "pass", result.reason
    assert result.compared >= 8


@pytest.mark.parametrize("name", sorted(RELATIONS))
def test_a_session_that_breaks_the_relation_fails_and_the_row_is_named(name: str, pipeline: Pipeline) -> None:
    result = related(pipeline, FaultyRuntime(lambda session: Damaged(session, DAMAGE[name])), name)
    assert result.status == "fail", result.reason
    assert "worst row" in result.reason


def test_padding_sides_does_not_apply_to_learned_positions_and_says_so() -> None:
    case = Case(name="absolute", source="random:bert", options={"seq_len": [48, 64]})
    result = related(Pipeline(case, check(case), Store(), Silent()), runtime("ort"), "padding_sides")
    assert result.status == "not_run"
    assert "positions count from the first column" in result.reason


def test_relations_do_not_apply_to_outputs_per_token() -> None:
    case = Case(
        name="tokens", source="random:bert", options={"pooling": "none", "seq_len": [48, 64]}, exporter="torchscript"
    )
    result = related(Pipeline(case, check(case), Store(), Silent()), runtime("ort"), "single_row")
    assert result.status == "not_run"
    assert "pooling none" in result.reason
