# SPDX-License-Identifier: Apache-2.0
"""MaxSim: the score of a document is the sum over the query's vectors of the greatest dot product with one of its own.

Computed in float64; NaN is propagated. This module knows no bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.vector_metrics import Floats, overtaken
from qeff_validate.tensors import Array


@dataclass(frozen=True, slots=True)
class Texts:
    """Where the vectors of each query and document stand.

    Attributes:
        queries: index of the text, first vector and end of each query.
        documents: of each document.
    """

    queries: tuple[tuple[int, int, int], ...]
    documents: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, scored: Sequence[Array], groups: Sequence[int]) -> Texts:
        """Return the places of texts with at least one vector.

        Args:
            scored: for each text, 1 for each token that has a vector, else 0.
            groups: 0 for a query, 1 for a document. Without queries or without documents all texts are both.
        """
        ends = np.cumsum([int(counts.sum()) for counts in scored]).tolist()
        places = [(text, end - int(scored[text].sum()), end) for text, end in enumerate(ends)]
        sides = [[place for place in places if groups[place[0]] == side and place[2] > place[1]] for side in (0, 1)]
        queries, documents = sides if all(sides) else (places, places)
        return cls(tuple(queries), tuple(documents))


def maxsim(vectors: Array, texts: Texts) -> Floats:
    """Return the score of each document for each query, divided by the query's number of vectors.

    Args:
        vectors: float ``[n, dim]``, of all texts one after the other.
        texts: where each text stands.

    Returns:
        float64 ``[queries, documents]``.
    """
    wide = vectors.astype(np.float64)
    scores: Floats = np.zeros((len(texts.queries), len(texts.documents)))
    with np.errstate(all="ignore"):
        for row, (_, start, end) in enumerate(texts.queries):
            similarities = wide[start:end] @ wide.T
            for column, (_, first, last) in enumerate(texts.documents):
                scores[row, column] = similarities[:, first:last].max(axis=1).mean()
    return scores


def summed_maxsim(query: Floats, document: Floats) -> float:
    """Return the score of a document for a query, vectors ``[n, dim]``; 0 if either has none."""
    return float((query @ document.T).max(axis=1).sum()) if len(query) and len(document) else 0.0


def maxsim_errors(reference: Array, actual: Array, texts: Texts) -> Floats:
    """Return the error of each score, float64 ``[queries, documents]``."""
    errors: Floats = np.abs(maxsim(actual, texts) - maxsim(reference, texts))
    return errors


def maxsim_metrics(reference: Array, actual: Array, texts: Texts, noise: float) -> list[Metric]:
    """Return the greatest error of a score, and how many documents change places.

    Args:
        reference: vectors of length 1, ``[n, dim]``.
        actual: of the same shape.
        texts: where each text stands.
        noise: the relative error of a vector that is expected from rounding alone. It moves a dot product by at most
            2·noise + noise², and so does it the mean of the greatest ones.

    Returns:
        ``maxsim_error`` and ``document_order``, each with the text of the worst query.
    """
    wanted, got = maxsim(reference, texts), maxsim(actual, texts)
    errors = np.abs(got - wanted)
    gap = 2 * (2 * noise + noise**2)
    changes = np.array([overtaken(*scores, gap) for scores in zip(wanted, got, strict=True)], dtype=np.float64)
    row, column = np.unravel_index(int(np.argmax(errors)), errors.shape)
    place = {"row": texts.queries[row][0], "document": texts.documents[column][0]}
    worst = texts.queries[int(np.argmax(changes))][0]
    return [
        Metric("maxsim_error", float(errors[row, column]), place),
        Metric("document_order", float(changes.sum()), {"row": worst, "gap": gap}),
    ]
