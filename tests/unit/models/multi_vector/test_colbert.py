# SPDX-License-Identifier: Apache-2.0
"""ColBERT: the reference is what ``MultiVectorEncoder(DIR)`` encodes for directories that it saved itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from small_models import save_model, save_tokenizer

import qeff_validate as qv
from qeff_validate.comparison.maxsim_metrics import Texts, maxsim
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError
from qeff_validate.models.corpus import PAIRS
from qeff_validate.mutation.head_mutants import MULTI_VECTOR_MUTANTS
from qeff_validate.protocols import model_kind
from qeff_validate.selftest.run import CaseUnderTest

WIDTH = 32
SKIPPED = ["The", "horse", "cards", "no such word"]
CLASSIC = {"strategy": "fixed", "length": 10}
SAVED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    # options of the Transformer | of MultiVectorMask | of MultiVectorEncoder
    "plain": ({}, {}, {}),
    "skip-list": ({}, {"skiplist_words": SKIPPED}, {}),
    "skip-list of queries too": ({}, {"skiplist_words": SKIPPED, "skiplist_tasks": ["query", "document"]}, {}),
    "expanded queries that the model does not see": ({"query_expansion": CLASSIC}, {"skiplist_words": SKIPPED}, {}),
    "expanded queries that it sees": ({"query_expansion": {**CLASSIC, "attend": True}}, {}, {}),
    "expanded by a token": ({"query_expansion": {"strategy": "min", "length": 6, "token": "red"}}, {}, {}),
    "lengths": ({"query_length": 5, "document_length": 8}, {}, {}),
    "prompts and similarity": (
        {},
        {},
        {"prompts": {"query": "red : ", "document": "blue : "}, "similarity_fn_name": "maxsim"},
    ),
}


def body(folder: Path) -> Path:
    save_model(folder, "AutoModel")
    save_tokenizer(folder)
    return folder


def layers(*sizes: int) -> list[Any]:
    from sentence_transformers.base.modules import Dense

    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [
            Dense(*pair, bias=place > 0, activation_function=torch.nn.Tanh() if place else torch.nn.Identity(), **names)
            for place, pair in enumerate(itertools.pairwise(sizes))
        ]


def saved(
    folder: Path, transformer: Mapping[str, Any], mask: Mapping[str, Any], options: Mapping[str, Any], *sizes: int
) -> tuple[Path, Any]:
    """Return a directory that MultiVectorEncoder has saved, and the MultiVectorEncoder that is loaded from it."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    modules = [
        Transformer(str(body(folder / "plain")), **transformer),
        *layers(*(sizes or (WIDTH, 16))),
        MultiVectorMask(**mask),
        Normalize(**names),
    ]
    MultiVectorEncoder(modules=modules, **options).save(str(folder / "saved"))
    return folder / "saved", MultiVectorEncoder(str(folder / "saved"))


def colbert(folder: Path, inputs: Any = None, **keys: Any) -> qv.Case:
    options = {"seq_len": [48, 64], **keys.pop("options", {})}
    return qv.Case(
        name="colbert",
        model="multi-vector",
        source=f"path:{folder}",
        inputs=inputs or {},
        options=options,
        exporter="torchscript",
        **keys,
    )


def sides() -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(query for query, _ in PAIRS)), list(dict.fromkeys(text for _, text in PAIRS))


def encoded(library: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    queries, documents = sides()
    return (
        library.encode_query(queries, convert_to_numpy=True),
        library.encode_document(documents, convert_to_numpy=True),
    )


def compare_with(library: Any, pipeline: Any) -> None:
    """The vectors of all texts, and the scores of all documents for each query."""
    vectors, inputs = pipeline.reference()["vectors"], pipeline.inputs()
    queries, documents = encoded(library)
    wanted = np.concatenate([*queries, *documents])
    assert vectors.shape == wanted.shape
    close(vectors, wanted, atol=5e-6)
    scores = library.similarity(queries, documents).numpy() / [[len(query)] for query in queries]
    close(maxsim(vectors, Texts.of(inputs.scored, inputs.groups)), scores, atol=5e-6)
    assert np.ptp(scores, axis=1).min() > 0.01, "scores tell documents apart"


@pytest.mark.numeric
@pytest.mark.parametrize("name", SAVED)
def test_reference_is_what_sentence_transformers_encodes(name: str, tmp_path: Path) -> None:
    folder, library = saved(tmp_path, *SAVED[name])
    compare_with(library, Runner(store=tmp_path / "store").pipeline(colbert(folder)))


@pytest.mark.numeric
def test_two_projections_are_applied(tmp_path: Path) -> None:
    folder, library = saved(tmp_path, {}, {}, {}, WIDTH, 48, 12)
    compare_with(library, Runner(store=tmp_path / "store").pipeline(colbert(folder)))


def test_skiplist_of_the_case_decides(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, *SAVED["skip-list"])
    runner = Runner(store=tmp_path / "store")
    kept, every = (
        runner.pipeline(colbert(folder, options=options)).reference()["vectors"] for options in ({}, {"skiplist": []})
    )
    words = [word for text in sides()[1] for word in text.split()]
    assert len(every) - len(kept) == sum(word in SKIPPED for word in words) > 5


@pytest.mark.parametrize("name", ["skip-list", "expanded queries that the model does not see"])
def test_every_runtime_agrees_and_every_fault_is_found(name: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, *SAVED[name])
    case = colbert(folder)
    report = qv.validate(case, runtimes=["torch", "ort", "sim"], store=tmp_path / "store")
    assert [(result.status, result.reason) for result in report.results] == [("pass", "")] * 3
    under_test = CaseUnderTest(case, Runner(store=tmp_path / "store").pipeline, tmp_path / "graphs")
    outcomes = {mutant.name: under_test.outcome(mutant, "fp32").verdict for mutant in MULTI_VECTOR_MUTANTS}
    assert set(outcomes.values()) == {"caught"}, outcomes


def test_relations_hold(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, *SAVED["skip-list"])
    runner = Runner(store=tmp_path / "store")
    pipeline = runner.pipeline(colbert(folder, tolerance="table"))
    for name in model_kind(pipeline.case).relations:
        result = pipeline.relation(runner.runtime("ort"), name)
        assert (result.status, result.reason) == ("pass", ""), name


# --- wrong input -----------------------------------------------------------------------------------


def test_recorded_reference_is_judged_without_the_model(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, *SAVED["expanded queries that the model does not see"])
    runner = Runner(store=tmp_path / "store")
    case = colbert(folder, tolerance="table")
    recorded = runner.pipeline(case).record(tmp_path)
    artifacts = case.artifacts.model_copy(update={"reference": str(recorded)})
    again = case.model_copy(update={"artifacts": artifacts})
    result = Runner(store=tmp_path / "store").result(again, "ort")
    assert (result.status, result.reason) == ("pass", "")


def test_checkpoint_without_a_projection_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no projection: give a directory as .* MultiVectorEncoder saves it"):
        Runner(store=tmp_path / "store").pipeline(colbert(body(tmp_path / "plain"))).reference()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"modules": "sentence_transformers.multi_vector_encoder.modules.HierarchicalTokenPooling"},
            r"a HierarchicalTokenPooling module \(1_Dense\) that is not",
        ),
        ({"mask": {"keep_only_token_ids": [1]}}, "keep_only_token_ids is not supported"),
        (
            {"settings": {"model_type": "ColBERT"}},
            "a directory of PyLate, to which .* load it with that, and save it again",
        ),
        ({"modules": "pylate.models.Dense.Dense"}, "a directory of PyLate"),
        ({"settings": {"model_type": None, "similarity_fn_name": "MaxSim"}}, "a directory of SentenceTransformer, to"),
        ({"transformer": {"query_expansion": {"strategy": "often"}}}, "wanted strategy fixed or min, and a length"),
        ({"transformer": {"query_expansion": {"strategy": "min", "length": -3}}}, "and a length from 1"),
        ({"transformer": {"query_expansion": {**CLASSIC, "token": 3}}}, "the token of query_expansion is 3"),
        ({"transformer": {"document_length": "9"}}, "document_length is '9', wanted a number from 1"),
        ({"mask": {"skiplist_words": 3}}, "skiplist_words of the MultiVectorMask is 3, wanted a list of words"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {}, {}, {})
    files = {
        "mask": "2_MultiVectorMask/config.json",
        "settings": "config_sentence_transformers.json",
        "transformer": "sentence_bert_config.json",
    }
    ((part, value),) = change.items()
    if part == "modules":
        entries = json.loads((folder / "modules.json").read_text())
        entries[1]["type"] = value
        (folder / "modules.json").write_text(json.dumps(entries))
    else:
        path = folder / files[part]
        path.write_text(json.dumps({**json.loads(path.read_text()), **value}))
    with pytest.raises(ConfigError, match=words):
        Runner(store=tmp_path / "store").pipeline(colbert(folder)).reference()


def test_query_longer_than_every_bucket_is_an_error(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {}, {}, {})
    with pytest.raises(ConfigError, match=r"tokens, and the greatest seq_len is 8: add a seq_len of at least"):
        Runner(store=tmp_path / "store").pipeline(colbert(folder, options={"seq_len": [8]})).inputs()


def test_texts_are_an_error(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {}, {}, {})
    case = colbert(folder, {"texts": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="the model kind 'multi-vector' reads pairs"):
        Runner(store=tmp_path / "store").pipeline(case).reference()
