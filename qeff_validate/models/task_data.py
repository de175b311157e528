# SPDX-License-Identifier: Apache-2.0
"""Task data: pairs of texts with scores that people gave, and what outputs reach on them. Loads no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat, NonNegativeInt

from qeff_validate.comparison.similarity import similarity
from qeff_validate.comparison.task_metrics import TaskScore, compare_ndcg, compare_spearman
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError, IncomparableError, suggest
from qeff_validate.models.tables import SUFFIXES, read_table
from qeff_validate.tensors import Tensors

SETS: Mapping[str, Path] = {path.stem: path for path in sorted((Path(__file__).parent / "task_sets").glob("*.tsv"))}
"""The sets that come with the library, by name."""

SIMILARITY, RETRIEVAL = ("sentence1", "sentence2", "score"), ("query", "document", "score")
"""Columns of the two kinds of sets."""

Measure = Literal["spearman", "ndcg_10"]


@dataclass(frozen=True, slots=True)
class TaskData:
    """Pairs of texts with scores.

    Attributes:
        name: of the set, or of its file.
        measure: ``spearman`` for pairs that are more or less alike, ``ndcg_10`` for documents of queries.
        pairs: the texts; of a retrieval set query and document.
        scores: how alike they are, or how relevant the document is to the query, from 0.
    """

    name: str
    measure: Measure
    pairs: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The distinct texts of either side, in their order."""
        left, right = (list(dict.fromkeys(side)) for side in zip(*self.pairs, strict=True))
        return left, right

    @property
    def texts(self) -> list[str]:
        """The distinct texts of both sides."""
        return list(dict.fromkeys([*self.sides[0], *self.sides[1]]))


class TaskRows(BaseModel):
    """Task data by rows of an output; plain, so that recorded inputs hold it.

    Attributes:
        name: of the set.
        measure: as in `TaskData`.
        left: the row of each pair's first text; of pairs that are rows themselves the number of its query.
        right: the row of its second text, or of the pair.
        scores: of each pair.
    """

    name: str
    measure: Measure
    left: list[NonNegativeInt]
    right: list[NonNegativeInt]
    scores: list[FiniteFloat]

    def check(self, rows: int) -> None:
        """Refuse task data, which may come from a file, that does not fit a number of rows.

        Raises:
            IncomparableError: it does not.
        """
        sizes = {len(self.left), len(self.right), len(self.scores)}
        if len(sizes) != 1 or not self.left or max(*self.left, *self.right) >= rows:
            raise IncomparableError(f"the task data {self.name!r} of tensor 'texts' does not fit its {rows} rows")


def read_task_data(case: Case) -> TaskData | None:
    """Return the task data that a case names; None if it names none.

    Raises:
        ConfigError: there is no such set, its file cannot be read or lacks a column, or its scores tell nothing apart.
    """
    named = case.inputs.dataset
    if named is None:
        return None
    path = SETS.get(named, Path(named))
    where = f"case {case.name!r}: dataset {named}"
    if named not in SETS and path.suffix not in SUFFIXES:
        raise ConfigError(
            f"{where}: no set is called so.{suggest(named, SETS)} A file of your own ends in .tsv, .csv or .jsonl"
        )
    table, columns = read_table(path, where, (SIMILARITY, RETRIEVAL), case.inputs.columns)
    pairs = tuple(zip(table.texts(columns[0]), table.texts(columns[1]), strict=True))
    scores = tuple(table.numbers("score"))
    measure: Measure = "spearman" if columns == SIMILARITY else "ndcg_10"
    data = TaskData(named if named in SETS else path.name, measure, pairs, scores)
    problem = _problem(data)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return data


def _problem(data: TaskData) -> str | None:
    """Return why no measure can be had of a set; None if it can."""
    if len(set(data.texts)) < 3 or len(data.pairs) < 3:
        return f"at least 3 pairs are needed, got {len(data.pairs)}"
    if data.measure == "spearman":
        return "all scores are equal: there is no order to agree with" if len(set(data.scores)) == 1 else None
    if min(data.scores) < 0:
        return f"the score of a document is its relevance, from 0; row {int(np.argmin(data.scores)) + 1} has less"
    twice = len(data.pairs) - len(set(data.pairs))
    if twice:
        return f"{twice} pairs of query and document are there twice"
    relevant = {query for (query, _), score in zip(data.pairs, data.scores, strict=True) if score > 0}
    if len(relevant) < 2:
        return f"at least 2 queries with a relevant document (score above 0) are needed, got {len(relevant)}"
    return None


def rows_of_texts(data: TaskData, left: Sequence[str], right: Sequence[str]) -> TaskRows:
    """Return task data by the rows of texts: those of ``left`` come first, and behind them those of ``right``.

    Args:
        data: the data.
        left: distinct texts, among them the first of each pair.
        right: distinct texts with the second of each pair; empty: they are among ``left``.
    """
    first = {text: row for row, text in enumerate(left)}
    second = {text: len(left) + row for row, text in enumerate(right)} if right else first
    places = [(first[a], second[b]) for a, b in data.pairs]
    return TaskRows(
        name=data.name,
        measure=data.measure,
        left=[row for row, _ in places],
        right=[row for _, row in places],
        scores=list(data.scores),
    )


def rows_of_pairs(data: TaskData, groups: Sequence[int]) -> TaskRows:
    """Return task data by rows that are pairs, each with the number of its query."""
    return TaskRows(
        name=data.name,
        measure=data.measure,
        left=list(groups),
        right=list(range(len(data.pairs))),
        scores=list(data.scores),
    )


RowScores = Callable[[Tensors, int, NDArray[np.int64]], Floats]
"""From outputs, the row of a text and the rows of others: the score of each for it, float64; greater is nearer."""


def vector_scores(output: str, name: str) -> RowScores:
    """Return the similarity of rows of an output ``[rows, d]``, by one of `similarity.SIMILARITIES`."""

    def score(outputs: Tensors, query: int, rows: NDArray[np.int64]) -> Floats:
        vectors = outputs[output]
        return similarity(name, vectors[query], vectors[rows])

    return score


def task_score(
    task: TaskRows, reference: Tensors, actual: Tensors, score: RowScores, *, seed: int, every_document: bool = True
) -> TaskScore:
    """Return what both outputs reach.

    Args:
        task: which rows belong together.
        reference: outputs of the original model.
        actual: outputs of a runtime.
        score: of rows, from outputs.
        seed: of the bootstrap.
        every_document: a query ranks all documents, of which those that it has no pair with are not relevant; False:
            those of its pairs alone.
    """
    left, right, wanted = np.array(task.left), np.array(task.right), np.array(task.scores, np.float64)
    if task.measure == "spearman":
        first, second = (
            np.array([score(outputs, a, right[at : at + 1])[0] for at, a in enumerate(task.left)], np.float64)
            for outputs in (reference, actual)
        )
        return compare_spearman(first, second, wanted, task.name, seed)
    documents = np.unique(right)
    scores: tuple[list[Floats], list[Floats]] = ([], [])
    relevance: list[Floats] = []
    for query in np.unique(left):
        pairs = left == query
        if not wanted[pairs].any():
            continue  # a query without a relevant document has no nDCG
        ranked = documents if every_document else right[pairs]
        gain = np.zeros(len(ranked))
        gain[np.searchsorted(documents, right[pairs]) if every_document else slice(None)] = wanted[pairs]
        relevance.append(gain)
        for run, outputs in zip(scores, (reference, actual), strict=True):
            run.append(score(outputs, int(query), ranked))
    return compare_ndcg(*scores, relevance, task.name, seed)
