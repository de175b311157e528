# SPDX-License-Identifier: Apache-2.0
"""Relations that held are taken from the store; whatever they depend on, or a failure, has them run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.builders import source_keys
from qeff_validate.config.case import Case
from qeff_validate.engine import Runner
from qeff_validate.pipeline import relation_store
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.relation_store import KEPT
from qeff_validate.protocols import Settings
from qeff_validate.report.result import Result

CONFIG = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
CASE = Case(
    name="kept",
    source="random:bert",
    config={**CONFIG, "vocab_size": 97},
    inputs={"texts": ["a b c", "d e", "the man", "d e"]},
    options={"seq_len": [16], "batch_size": 2},
    exporter="torchscript",
    tolerance="table",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The relations that were run, and not taken from the store."""
    seen: list[str] = []
    related = Pipeline._related

    def counted(self: Pipeline, runtime: Any, name: str, base: dict[str, Any]) -> Result:
        seen.append(name)
        return related(self, runtime, name, base)

    monkeypatch.setattr(Pipeline, "_related", counted)
    return seen


def relation(store: Path, case: Case = CASE, name: str = "permutation", runtime: str = "ort", **more: Any) -> Result:
    return Runner(store=store, **more).relation(case, runtime, name)


def test_relation_that_held_is_not_run_again_and_says_so(store: Path, runs: list[str]) -> None:
    first, again = relation(store), relation(store, CASE.model_copy(update={"name": "other", "marks": ["slow"]}))
    assert runs == ["permutation"]
    assert (first.status, first.notes) == ("pass", ())
    assert (again.status, again.notes, again.case) == ("pass", (KEPT,), "other")
    assert again.metrics == replace(first).metrics


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "duplicates"},
        {"runtime": "torch"},
        {"case": CASE.model_copy(update={"seed": 1})},
        {"case": CASE.model_copy(update={"tolerance": {"ort": {"rel_l2": 1e-3, "why": "test"}}})},
        {"case": CASE.model_copy(update={"options": {"seq_len": [16], "batch_size": 3}})},
        {"settings": Settings(ort_optimization="basic")},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_relation_is_run_again_where_something_else_is_asked(
    changed: dict[str, Any], store: Path, runs: list[str]
) -> None:
    relation(store)
    del runs[:]
    relation(store, **changed)
    assert len(runs) == 1


def test_relation_is_run_again_with_other_code_or_another_kernel(
    store: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    relation(store)
    del runs[:]
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "SSE41")
    relation(store)
    assert source_keys.package_key() != source_keys.code_key()
    monkeypatch.setattr(relation_store, "package_key", lambda: "other")
    relation(store)
    assert len(runs) == 2


def test_failed_relation_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Result("kept", "ort", "fail", reason="rows differ", reference="itself", stage="permutation")
    monkeypatch.setattr(Pipeline, "_related", lambda *_: broken)
    assert relation(tmp_path) == broken
    monkeypatch.undo()
    assert relation(tmp_path).status == "pass"


def test_card_and_model_in_memory_are_judged_each_time(
    store: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relation_store, "_can_be_kept", lambda *_: False)
    relation(store)
    relation(store)
    assert len(runs) == 2
    monkeypatch.undo()
    pipeline = Runner(store=store).pipeline(CASE)
    for name, kept in (("ort", True), ("sim", True), ("ai100", False)):
        assert relation_store._can_be_kept(pipeline, Runner().runtime(name)) is kept
    given = Runner(store=store, model=object()).pipeline(CASE.model_copy(update={"source": "memory"}))
    assert not relation_store._can_be_kept(given, Runner().runtime("ort"))
