# SPDX-License-Identifier: Apache-2.0
"""SPLADE: the reference is what ``SparseEncoder(DIR).encode`` returns for directories that it saved itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import close
from small_models import save_model, save_tokenizer

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError
from qeff_validate.models.corpus import TEXTS
from qeff_validate.mutation.head_mutants import SPARSE_MUTANTS
from qeff_validate.protocols import model_kind
from qeff_validate.selftest.run import CaseUnderTest

GIVEN = [*TEXTS, "red green blue " * 12]
PROMPT = {"prompts": {"query": "red : ", "document": ""}, "default_prompt_name": "query"}
SAVED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    # options of SpladePooling | of SparseEncoder | of the case
    "max": ({}, {}, {}),
    "sum": ({"pooling_strategy": "sum"}, {}, {}),
    "two logarithms": ({"activation_function": "log1p_relu"}, {}, {}),
    "default prompt": ({}, PROMPT, {}),
    "prompt by name": ({}, {**PROMPT, "default_prompt_name": None}, {"prompt": "query"}),
    "cut": ({}, {"max_seq_length": 16}, {}),
}


def masked_lm(folder: Path, model_type: str = "bert") -> Path:
    save_model(folder, "AutoModelForMaskedLM", model_type=model_type)
    save_tokenizer(folder, types=model_type == "bert")
    return folder


def saved(folder: Path, pooling: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Path, Any]:
    """Return a directory that SparseEncoder has saved, and the SparseEncoder that is loaded from it."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    options = dict(options)
    length = {"max_seq_length": options.pop("max_seq_length")} if "max_seq_length" in options else {}
    transformer = Transformer(str(masked_lm(folder / "plain")), transformer_task="fill-mask", **length)
    SparseEncoder(modules=[transformer, SpladePooling(**pooling)], **options).save(str(folder / "saved"))
    return folder / "saved", SparseEncoder(str(folder / "saved"))


def splade(folder: Path, inputs: Any = None, **keys: Any) -> qv.Case:
    options = {"seq_len": [48, 96], **keys.pop("options", {})}
    return qv.Case(
        name="splade",
        model="sparse-embedding",
        source=f"path:{folder}",
        inputs=inputs or {},
        options=options,
        exporter="torchscript",
        **keys,
    )


def reference(case: qv.Case, store: Path) -> np.ndarray:
    return Runner(store=store).pipeline(case).reference()["output"]


def encoded(library: Any, texts: list[str], **options: Any) -> np.ndarray:
    return library.encode(texts, convert_to_sparse_tensor=False, **options).cpu().numpy()


def compare_with(library: np.ndarray, ours: np.ndarray) -> None:
    lengths = np.linalg.norm(library, axis=1, keepdims=True)
    assert lengths.min() > 0.1
    assert 0.05 < np.mean(library == 0) < 0.95, "some words have a weight, and some have none"
    close((ours - library) / lengths, 0, atol=5e-6)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SAVED)
def test_reference_is_what_sentence_transformers_encodes(name: str, tmp_path: Path) -> None:
    pooling, options, of_case = SAVED[name]
    folder, library = saved(tmp_path, pooling, options)
    wanted = encoded(library, GIVEN, **({"prompt_name": of_case["prompt"]} if of_case else {}))
    compare_with(wanted, reference(splade(folder, {"texts": GIVEN}, options=of_case), tmp_path / "store"))


@pytest.mark.numeric
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_plain_checkpoint_is_max_pooled_as_sentence_transformers_does(model_type: str, tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder

    folder = masked_lm(tmp_path / "plain", model_type)
    compare_with(encoded(SparseEncoder(str(folder)), list(TEXTS)), reference(splade(folder), tmp_path / "store"))


@pytest.mark.numeric
def test_module_of_an_older_version_is_read(tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder

    folder, _ = saved(tmp_path, {}, {})
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["type"] = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    wanted = encoded(SparseEncoder(str(folder)), GIVEN)
    compare_with(wanted, reference(splade(folder, {"texts": GIVEN}), tmp_path / "store"))


def test_every_runtime_agrees_and_every_fault_is_found(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {}, {})
    case = splade(folder)
    report = qv.validate(case, runtimes=["torch", "ort", "sim"], store=tmp_path / "store")
    assert [(result.status, result.reason) for result in report.results] == [("pass", "")] * 3
    under_test = CaseUnderTest(case, Runner(store=tmp_path / "store").pipeline, tmp_path / "graphs")
    outcomes = {mutant.name: under_test.outcome(mutant, "fp32").verdict for mutant in SPARSE_MUTANTS}
    assert set(outcomes.values()) == {"caught"}, outcomes


def test_relations_hold(tmp_path: Path) -> None:
    runner = Runner(store=tmp_path / "store")
    pipeline = runner.pipeline(splade(masked_lm(tmp_path / "plain"), tolerance="table"))
    for name in model_kind(pipeline.case).relations:
        result = pipeline.relation(runner.runtime("ort"), name)
        assert (result.status, result.reason) == ("pass", ""), name


def test_text_without_a_weight_must_stay_zeros(tmp_path: Path) -> None:
    """A bias far below zero: no word of any text has a weight, so there is nothing to compare."""
    import torch
    from transformers import AutoModelForMaskedLM

    given = AutoModelForMaskedLM.from_pretrained(masked_lm(tmp_path / "plain"))
    with torch.no_grad():
        given.cls.predictions.bias -= 100
    case = splade(tmp_path, tolerance="table")
    results = qv.validate(case, runtimes=["torch"], model=given, store=tmp_path / "store").results
    assert (results[0].status, results[0].compared) == ("inconclusive", 0)
    assert "nothing to compare" in results[0].reason


def test_directory_with_another_module_is_refused_by_its_name(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {}, {})
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["type"] = "sentence_transformers.sparse_encoder.modules.SparseAutoEncoder"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"goes on with SparseAutoEncoder; a sparse embedding needs a SpladePooling"):
        reference(splade(folder), tmp_path / "store")


def test_pairs_are_an_error(tmp_path: Path) -> None:
    case = splade(masked_lm(tmp_path / "plain"), {"pairs": [["a", "b"], ["a", "c"], ["a", "d"]]})
    with pytest.raises(ConfigError, match="the model kind 'sparse-embedding' reads single texts"):
        reference(case, tmp_path / "store")


@pytest.mark.numeric
def test_route_of_a_router_without_inference_for_queries(tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
    from transformers import AutoTokenizer

    plain = masked_lm(tmp_path / "plain")
    static = SparseStaticEmbedding(AutoTokenizer.from_pretrained(plain))
    documents = [Transformer(str(plain), transformer_task="fill-mask"), SpladePooling("sum")]
    SparseEncoder(modules=[Router.for_query_document([static], documents)]).save(str(tmp_path / "saved"))
    case = splade(tmp_path / "saved", {"texts": GIVEN}, options={"route": "document"})
    wanted = SparseEncoder(str(tmp_path / "saved")).encode_document(GIVEN, convert_to_sparse_tensor=False)
    compare_with(wanted.cpu().numpy(), reference(case, tmp_path / "store"))
    with pytest.raises(ConfigError, match="a SparseStaticEmbedding module: it looks up one weight for each word"):
        reference(splade(tmp_path / "saved", options={"route": "query"}), tmp_path / "store")


def test_number_of_words_that_encode_keeps_is_told(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {}, {"max_active_dims": 4})
    notes = qv.model(splade(folder)).rows().notes
    assert "of each text sentence-transformers keeps the 4 strongest words (max_active_dims); judged are all" in notes
