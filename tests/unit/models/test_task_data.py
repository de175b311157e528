# SPDX-License-Identifier: Apache-2.0
"""Task data: what files hold, what is refused, and that numbers stand beside a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import close
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

import qeff_validate as qv
from qeff_validate.engine import model
from qeff_validate.errors import ConfigError, IncomparableError
from qeff_validate.models.task_data import SETS, TaskRows, read_task_data, rows_of_texts, task_score, vector_scores
from qeff_validate.models.token_rows import TokenRows

STS = "sentence1,sentence2,score\na,b,5\na,c,1\nd,b,0.5\n"
RETRIEVAL = '{"query": "a", "document": "b", "score": 2}\n{"query": "c", "document": "d", "score": "1"}\n' + (
    '{"query": "c", "document": "b", "score": 0}\n'
)


def case(kind: str = "embedding", **inputs: Any) -> qv.Case:
    return qv.Case(name="x", model=kind, source="random:bert", inputs=inputs)


def written(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", SETS)
def test_sets_of_the_library_are_read(name: str) -> None:
    data = read_task_data(case(dataset=name))
    assert data is not None
    assert (data.measure, len(data.pairs)) in {("spearman", 160), ("ndcg_10", 120)}
    assert len(set(data.pairs)) == len(data.pairs)
    assert not any(text != text.strip() or not text for text in data.texts)


def test_texts_are_a_column_that_may_have_another_name(tmp_path: Path) -> None:
    file = written(tmp_path / "texts.csv", 'id,body\n1,"a, b"\n2,c\n3,d\n')
    assert model(case(texts_file=file, columns={"text": "body"})).asked()["texts"] == ["a, b", "c", "d"]
    with pytest.raises(ConfigError, match=r"no column 'text'; its columns are 'id', 'body'"):
        model(case(texts_file=file)).asked()
    lines = written(tmp_path / "texts.txt", "a\tb\nc\nd\n")
    assert model(case(texts_file=lines)).asked()["texts"] == ["a\tb", "c", "d"]


REFUSED = {
    "a column is missing": ("a.csv", "sentence1,score\na,1\n", {}, "no column 'sentence2'; its columns are"),
    "nothing that is known": ("a.tsv", "x\ty\n1\t2\n", {}, "its columns are 'x', 'y', and wanted are 'sentence1'"),
    "a key that one row lacks": ("a.jsonl", RETRIEVAL + '{"query": "e"}', {}, "row 4 has no column 'document'; its"),
    "an empty file": ("a.jsonl", "", {}, "it is empty"),
    "a header alone": ("a.csv", "sentence1,sentence2,score\n", {}, "it is empty: it has no row below a header"),
    "a score that is a word": ("a.csv", STS.replace("0.5", "high"), {}, "row 3 has no number in the column 'score'"),
    "a score that is none": ("a.csv", STS.replace("0.5", "nan"), {}, "row 3 has no number in the column 'score'"),
    "a value too many": ("a.csv", STS + "a,b,c,4\n", {}, "row 4 has 4 values, and the header has 3 columns"),
    "a role that is none": ("a.csv", STS, {"scores": "x"}, "no column is read as 'scores'. Did you mean 'score'"),
    "scores that say nothing": ("a.csv", STS.replace("0.5", "5").replace("c,1", "c,5"), {}, "all scores are equal"),
    "no relevance": ("a.jsonl", RETRIEVAL.replace("2}", "0}"), {}, "at least 2 queries with a relevant document"),
    "a relevance below 0": ("a.jsonl", RETRIEVAL.replace("2}", "-2}"), {}, "row 1 has less"),
    "a pair twice": ("a.jsonl", RETRIEVAL + RETRIEVAL, {}, "3 pairs of query and document are there twice"),
    "another format": ("a.parquet", "PAR1", {}, r"no set is called so.* ends in \.tsv, \.csv or \.jsonl"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_file_that_is_no_task_data_is_an_error_that_says_why(what: str, tmp_path: Path) -> None:
    name, content, columns, words = REFUSED[what]
    with pytest.raises(ConfigError, match=words):
        read_task_data(case(dataset=written(tmp_path / name, content), columns=columns))


@pytest.mark.parametrize(
    ("kind", "config", "options", "words"),
    [
        ("embedding", {}, {"pooling": "none"}, "pooling: none gives a vector for each token"),
        ("reranker", {"num_labels": 3}, {}, "3 labels, and task data need one score"),
        ("sequence-classification", {}, {}, "gives pairs of texts no score"),
        ("peft-causal-lm", {}, {}, "reads prompts"),
    ],
)
def test_kind_without_a_score_of_pairs_refuses_task_data(kind: str, config: Any, options: Any, words: str) -> None:
    source = "random:llama" if kind == "peft-causal-lm" else "random:bert"
    made = qv.Case(name="x", model=kind, source=source, config=config, options=options, inputs={"dataset": "sts"})
    with pytest.raises(ConfigError, match=words):
        model(made).inputs_key()


def test_unknown_set_and_columns_without_a_file_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"no set is called so\. Did you mean 'retrieval'"):
        read_task_data(case(dataset="retreival"))
    with pytest.raises(ValueError, match="columns are of a file"):
        case(texts=["a", "b", "c"], columns={"text": "x"})


VECTORS = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
"""Of the texts a, d, b, c of `STS`, and a, c, b, d of `RETRIEVAL`."""


@pytest.mark.numeric
def test_pairs_of_texts_are_compared_by_their_rows(tmp_path: Path) -> None:
    data = read_task_data(case(dataset=written(tmp_path / "a.csv", STS)))
    assert data is not None
    assert data.texts == ["a", "d", "b", "c"]
    reference, actual = {"output": VECTORS}, {"output": VECTORS[::-1]}
    rows = rows_of_texts(data, data.texts, ())
    made = task_score(rows, reference, actual, vector_scores("output", "dot"), seed=0)
    for value, vectors in ((made.reference, VECTORS), (made.value, VECTORS[::-1])):
        dots = [vectors[left] @ vectors[right] for left, right in ((0, 2), (0, 3), (1, 2))]
        close(value, spearmanr(dots, data.scores).statistic, atol=1e-9)


@pytest.mark.numeric
def test_queries_rank_all_documents_or_those_of_their_pairs(tmp_path: Path) -> None:
    data = read_task_data(case(dataset=written(tmp_path / "a.jsonl", RETRIEVAL)))
    assert data is not None
    outputs, rows = {"output": VECTORS}, rows_of_texts(data, data.texts, ())
    score = vector_scores("output", "dot")
    dots = [[VECTORS[query] @ VECTORS[document] for document in (2, 3)] for query in (0, 1)]
    wanted = ndcg_score([[2, 0], [0, 1]], dots, k=10)
    close(task_score(rows, outputs, outputs, score, seed=0).value, wanted, atol=1e-9)
    alone = task_score(rows, outputs, outputs, score, seed=0, every_document=False).value
    close(alone, (1 + ndcg_score([[0, 1]], dots[1:], k=10)) / 2, atol=1e-9)


def test_recorded_task_data_that_fits_no_rows_is_refused() -> None:
    task = TaskRows(name="sts", measure="spearman", left=[0], right=[9], scores=[1.0])
    rows = TokenRows((np.array([5]), np.array([6])), 0, ("a", "b"), task=task, similarity="dot")
    with pytest.raises(IncomparableError, match="task data 'sts' of tensor 'texts' does not fit its 2 rows"):
        TokenRows.from_stored(rows.stored())


@pytest.mark.integration
def test_report_tells_what_both_reach_beside_a_verdict_that_does_not_depend_on_it(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", STS)
    made = qv.Case(
        name="x", source="random:bert", exporter="torchscript", tolerance="table", runtimes=["ort"],
        options={"pooling": "mean", "seq_len": [16]}, inputs={"dataset": file},
    )  # fmt: skip
    report = qv.validate(made)
    assert report.passed
    report.write(tmp_path / "report")
    (result,) = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    task = result["task"]
    assert (task["metric"], task["data"], task["count"], task["difference"]) == ("spearman", "a.csv", 3, 0)
    sentence = f"x-ort (pass): Spearman on a.csv {task['value']:.4f} (reference {task['reference']:.4f})"
    assert any(f"Task data: {sentence}" in line for line in report.closing())
    assert sentence in (tmp_path / "report" / "report.md").read_text()
    assert "<h3>Task data</h3>" in (tmp_path / "report" / "report.html").read_text()
