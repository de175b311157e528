# SPDX-License-Identifier: Apache-2.0
"""Each relation of language models passes on a healthy session and fails on one that breaks just it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import check
from qeff_validate.models.causal_lm.relations import RELATIONS
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Runtime, Session, runtime
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Tensors

Symptom = Callable[[Tensors], bool]


class Damaged:
    """A session whose logits are off from the moment on in which a run shows the symptom, until a text begins anew."""

    def __init__(self, session: Session, symptom: Symptom) -> None:
        self._session, self._symptom, self._off = session, symptom, False
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        found = dict(self._session.run(feeds, fetch=fetch))
        begins = bool((feeds["position_ids"] == 0).any())
        self._off = self._symptom(feeds) or (self._off and not begins)
        if "logits" in found and self._off:
            found["logits"] = np.roll(found["logits"], 1, axis=-1)
        return found

    def reset(self) -> None:
        self._session.reset()


class Slots:
    """Remembers the first token of slot 0, so that a text that comes to another slot is noticed."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def __call__(self, feeds: Tensors) -> bool:
        ids, places = feeds["input_ids"], feeds["position_ids"]
        moved = False
        for slot, column in zip(*np.nonzero(places == 0), strict=True):
            moved |= self._seen.setdefault(int(ids[slot, column : column + 2].sum()), int(slot)) != slot
        return moved


class Poison:
    """Notices that keys were fed, and that a text began after that."""

    def __init__(self) -> None:
        self._fed = False

    def __call__(self, feeds: Tensors) -> bool:
        self._fed |= "past_key.0" in feeds
        return self._fed


class Continued:
    """Notices that a text goes on at another place than behind its last token."""

    def __init__(self) -> None:
        self._reach: dict[int, int] = {}

    def __call__(self, feeds: Tensors) -> bool:
        back = False
        for row, places in enumerate(feeds["position_ids"]):
            if places.max() >= 0:
                first = int(places[places >= 0].min())
                back |= 0 < first <= self._reach.get(row, -1)
                self._reach[row] = int(places.max())
        return back


SYMPTOMS: dict[str, Callable[[], Symptom]] = {
    "merged": lambda: lambda feeds: bool((feeds["position_ids"] == 0).any()),
    "other_chunks": lambda: lambda feeds: feeds["input_ids"].shape[1] == 1 and bool((feeds["position_ids"] == 0).any()),
    "other_padding": lambda: (
        lambda feeds: bool(((feeds["position_ids"][:, 0] < 0) & (feeds["position_ids"][:, -1] >= 0)).any())
    ),
    "kept_prefix": Continued,
    "other_slots": Slots,
    "poisoned_state": Poison,
    "row_alone": lambda: (
        lambda feeds: bool((feeds["position_ids"][0] == 0).any() and (feeds["position_ids"][1] < 0).all())
    ),
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    options = {
        "peft_method": "lora",
        "peft": {"r": 4},
        "prompts": ["one two three four five", "six", "seven eight nine", "ten eleven"],
        "max_new_tokens": 3,
        "prefill_seq_len": 4,
        "ctx_len": 16,
    }
    case = Case(name="relations", model="peft-causal-lm", source="random:llama", options=options)
    return Pipeline(case, check(case), Store(), Silent())


def related(pipeline: Pipeline, adapter: Any, name: str) -> Any:
    typed: Runtime = adapter
    return pipeline.relation(typed, name)


class Stale:
    """A session whose values of one layer are off by 1 % where it hands out what it retains; all finite as before."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        found = dict(self._session.run(feeds, fetch=fetch))
        name = "past_value.1_RetainedState"
        if name in found:
            found[name] = found[name] * np.float32(1.01)
        return found

    def reset(self) -> None:
        self._session.reset()


def small(feeds: Tensors) -> bool:
    """Notice a share of an adapter that is so small that a runtime might drop it."""
    found = [array for name, array in feeds.items() if "lora_B" in name and array.any()]
    return bool(found) and max(float(np.abs(array).max()) for array in found) < 0.005


DAMAGED: dict[str, Callable[[Session], Any]] = {
    "kv_cache": Stale,
    "scaled": lambda session: Damaged(session, small),
    **{name: lambda session, made=made: Damaged(session, made()) for name, made in SYMPTOMS.items()},
}

KEPT = sorted(set(RELATIONS) - {"mixed_rows"})
"""`test_mixed_batch` has the one that needs several adapters in a batch."""


def test_a_damage_is_known_for_every_relation() -> None:
    assert sorted(DAMAGED) == KEPT


@pytest.mark.parametrize("name", KEPT)
def test_a_healthy_session_keeps_the_relation(name: str, pipeline: Pipeline) -> None:
    result = related(pipeline, runtime("ort"), name)
    assert result.status == "pass", result.reason
    assert result.compared == result.planned >= 4


@pytest.mark.parametrize("name", KEPT)
def test_a_session_that_breaks_the_relation_fails_and_the_row_is_named(name: str, pipeline: Pipeline) -> None:
    result = related(pipeline, FaultyRuntime(DAMAGED[name]), name)
    assert result.status == "fail", result.reason
    assert "worst row" in result.reason


@pytest.mark.parametrize("name", ["kv_cache", "merged"])
def test_a_relation_that_needs_the_original_does_not_apply_to_a_recorded_reference(
    name: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    artifacts = {"reference": str(pipeline.record(tmp_path))}
    case = Case.model_validate({**pipeline.case.model_dump(), "source": "path:/nowhere", "artifacts": artifacts})
    recorded = Pipeline(case, check(case), Store(), Silent())
    onnx = pipeline.onnx()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "onnx", lambda: onnx)
        result = related(recorded, runtime("ort"), name)
    assert (result.status, "the reference is recorded" in result.reason) == ("not_run", True), result.reason
