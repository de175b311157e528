# SPDX-License-Identifier: Apache-2.0
"""Rerankers: the reference is what ``CrossEncoder(DIR).predict`` returns for directories that it saved itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from small_models import WORDS, save_model, save_tokenizer

import qeff_validate as qv
from qeff_validate.engine import Runner, model
from qeff_validate.errors import ConfigError
from qeff_validate.models.corpus import PAIRS
from qeff_validate.mutation.head_mutants import SCORE_MUTANTS
from qeff_validate.protocols import model_kind
from qeff_validate.selftest.run import CaseUnderTest

LONG = ("red green blue " * 12, "one two three . " * 12)
SAVED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    # options of the config | options of CrossEncoder
    "one label": ({"num_labels": 1}, {}),
    "three labels": ({"num_labels": 3}, {}),
    "no activation": ({"num_labels": 1}, {"activation_fn": torch.nn.Identity()}),
    "tanh": ({"num_labels": 2}, {"activation_fn": torch.nn.Tanh()}),
    "GELU": ({"num_labels": 1}, {"activation_fn": torch.nn.GELU()}),
    "prompt": ({"num_labels": 1}, {"prompts": {"query": "red : "}, "default_prompt_name": "query"}),
    "cut": ({"num_labels": 1}, {"max_length": 24}),
    "no token types": ({"num_labels": 1, "model_type": "distilbert"}, {}),
    "token types that the model ignores": ({"num_labels": 1, "type_vocab_size": 0, "model_type": "deberta-v2"}, {}),
}


def saved(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Path, Any]:
    """Return a directory that CrossEncoder has saved, and the CrossEncoder that is loaded from it."""
    from sentence_transformers import CrossEncoder

    save_model(folder / "plain", "AutoModelForSequenceClassification", **config)
    save_tokenizer(folder / "plain", types=config.get("model_type") != "distilbert")
    CrossEncoder(str(folder / "plain"), **options).save(str(folder / "saved"))
    return folder / "saved", CrossEncoder(str(folder / "saved"))


def reranker(folder: Path, **keys: Any) -> qv.Case:
    inputs = keys.pop("inputs", {"pairs": [[*pair] for pair in (*PAIRS, LONG)]})
    options = {"seq_len": [64, 96], **keys.pop("options", {})}
    return qv.Case(
        name="reranker",
        model="reranker",
        source=f"path:{folder}",
        inputs=inputs,
        options=options,
        exporter="torchscript",
        **keys,
    )


def reference(case: qv.Case, store: Path) -> np.ndarray:
    return Runner(store=store).pipeline(case).reference()["scores"]


@pytest.mark.numeric
@pytest.mark.parametrize("name", SAVED)
def test_reference_is_what_sentence_transformers_predicts(name: str, tmp_path: Path) -> None:
    folder, library = saved(tmp_path, *SAVED[name])
    wanted = library.predict([[*pair] for pair in (*PAIRS, LONG)]).reshape(len(PAIRS) + 1, -1)
    assert np.ptp(wanted) > 0.01, "the scores tell pairs apart"
    close(reference(reranker(folder), tmp_path / "store"), wanted, rtol=5e-6, atol=5e-6)


@pytest.mark.numeric
def test_activation_in_the_config_of_an_older_version_is_applied(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = save_model(tmp_path / "old", "AutoModelForSequenceClassification", num_labels=1)
    save_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        wanted = CrossEncoder(str(folder)).predict([[*pair] for pair in PAIRS])[:, None]
        assert wanted.min() < 0, "Sigmoid, the default, was not applied"
        case = reranker(folder, inputs={})
        close(reference(case, tmp_path / "store"), wanted, rtol=5e-6, atol=5e-6)
        assert reference(case.model_copy(update={"options": {"activation": "Sigmoid"}}), tmp_path / "store").min() > 0


def test_every_runtime_agrees_and_every_fault_is_found(tmp_path: Path) -> None:
    """With two labels of which both are trained, so that their order counts."""
    folder, _ = saved(tmp_path, {"num_labels": 2}, {"activation_fn": torch.nn.Sigmoid()})
    case = reranker(folder, inputs={})
    report = qv.validate(case, runtimes=["torch", "ort", "sim"], store=tmp_path / "store")
    assert [(result.status, result.reason) for result in report.results] == [("pass", "")] * 3
    runner = Runner(store=tmp_path / "store")
    under_test = CaseUnderTest(case, runner.pipeline, tmp_path / "graphs")
    outcomes = {mutant.name: under_test.outcome(mutant, "fp32").verdict for mutant in SCORE_MUTANTS}
    assert set(outcomes.values()) == {"caught"}, outcomes


def test_relations_hold(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {"num_labels": 1}, {})
    runner = Runner(store=tmp_path / "store")
    pipeline = runner.pipeline(reranker(folder, inputs={}, tolerance="table"))
    for name in model_kind(pipeline.case).relations:
        result = pipeline.relation(runner.runtime("ort"), name)
        assert (result.status, result.reason) == ("pass", ""), name


def test_file_that_ends_in_logits_is_judged_without_the_activation(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {"num_labels": 1}, {})
    runner = Runner(store=tmp_path / "store")
    case = reranker(folder, inputs={}, tolerance="table")
    pairs = {"pairs": [[*pair] for pair in PAIRS]}
    plain = qv.Case(**{**case.plain(), "model": "sequence-classification", "inputs": pairs})
    artifacts = {"onnx": str(runner.pipeline(plain).onnx().path), "outputs": {"scores": "logits"}}
    for activation, status in (("Identity", "pass"), (None, "fail")):
        options = {**case.options, "activation": activation}
        judged = qv.Case(**{**case.plain(), "options": options, "artifacts": artifacts})
        result = runner.result(judged, "ort")
        assert result.status == status, result.reason


# --- wrong input -----------------------------------------------------------------------------------


def asked(inputs: dict[str, Any]) -> Any:
    return model(qv.Case(name="x", model="reranker", source="random:bert", inputs=inputs)).asked()


def test_texts_instead_of_pairs_are_an_error_that_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"inputs: texts: the model kind 'reranker' reads pairs: give pairs"):
        asked({"texts": ["a", "b", "c"]})


def test_pairs_for_an_embedding_are_an_error() -> None:
    case = qv.Case(name="x", source="random:bert", inputs={"pairs": [["a", "b"], ["a", "c"], ["a", "d"]]})
    with pytest.raises(ConfigError, match=r"inputs: pairs: the model kind 'embedding' reads single texts"):
        model(case).asked()


FILES = {
    "pairs.tsv": 'query\tid\tdocument\na\t1\t"b\na\t2\tc\nd\t3\t\n',
    "pairs.csv": 'document,query\n"""b",a\nc,a\n"",d\n',
    "pairs.jsonl": '{"query": "a", "document": "\\"b"}\n{"query": "a", "document": "c"}\n\n'
    '{"query": "d", "document": ""}',
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_pairs_is_read_by_its_columns(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert asked({"pairs_file": str(tmp_path / name)})["pairs"] == [["a", '"b'], ["a", "c"], ["d", ""]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pairs.tsv", "query\ttext\na\tb\n", r"no column 'document'; its columns are 'query', 'text'"),
        ("pairs.tsv", "query\tdocument\na\tb\tc\n", "row 1 has 3 values, and the header has 2 columns"),
        ("pairs.csv", "query,document,query\na,b,c\n", "two columns are called 'query'"),
        ("pairs.csv", "", "it is empty"),
        ("pairs.csv", "query,document\na\n", "row 1 has no text in the column 'document'"),
        ("pairs.jsonl", '{"query": "a", "document": 3}', "row 1 has no text in the column 'document'"),
        ("pairs.jsonl", "[1]", "line 1 is no JSON object"),
        ("pairs.jsonl", "{", "cannot read it"),
        ("pairs.csv", 'query,document\n"a', "cannot read it"),
        ("pairs.txt", "a\tb", r"must end in \.tsv, \.csv or \.jsonl"),
        ("pairs.tsv", "query\tdocument\na\tb\n", "at least 3 distinct pairs are needed, got 1"),
    ],
)
def test_file_that_holds_no_pairs_is_an_error(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        asked({"pairs_file": str(tmp_path / name)})


def test_checkpoint_without_a_classifier_is_an_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "body", "AutoModel")
    save_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"lack 2 tensors .*'classifier"):
        reference(reranker(folder, inputs={}), tmp_path / "store")


def test_directory_for_embeddings_names_the_right_kind(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = save_model(tmp_path / "body", "AutoModel")
    save_tokenizer(folder)
    SentenceTransformer(str(folder)).save(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="say model: embedding"):
        reference(reranker(tmp_path / "saved", inputs={}), tmp_path / "store")
    rerankers, _ = saved(tmp_path, {"num_labels": 1}, {})
    with pytest.raises(ConfigError, match="say model: reranker or sequence-classification"):
        model(qv.Case(name="x", source=f"path:{rerankers}")).asked()


def test_words_of_the_corpus_are_in_the_vocabulary() -> None:
    """Else all texts would be rows of unknown tokens, and their order would not count."""
    assert sum(word in WORDS for query, text in PAIRS for word in f"{query} {text}".split()) > 30
