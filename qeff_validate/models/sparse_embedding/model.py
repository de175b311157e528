# SPDX-License-Identifier: Apache-2.0
"""SPLADE: one weight for each word of the vocabulary, from a masked language model's logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from qeff_validate.comparison.sparse_metrics import dot_error, zero_rows
from qeff_validate.comparison.task_metrics import TaskScore
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import Rows, Verdict, worst_errors
from qeff_validate.errors import ConfigError
from qeff_validate.models.case_inputs import texts_of
from qeff_validate.models.corpus import TEXTS
from qeff_validate.models.head_model import Head, HeadModel, Text
from qeff_validate.models.sources.checkpoint import read_object
from qeff_validate.models.sources.encode_settings import SETTINGS
from qeff_validate.models.sources.resolve import SentenceFolder
from qeff_validate.models.sources.sentence_directory import module_list
from qeff_validate.models.sparse_embedding.options import SparseEmbeddingOptions
from qeff_validate.models.task_data import TaskRows, read_task_data, rows_of_texts, task_score, vector_scores
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import ComparisonContext, TaskScored
from qeff_validate.tensors import Tensors


class SparseEmbedding(HeadModel, TaskScored):
    """The model kind ``sparse-embedding``: ``input_ids, attention_mask → output [batch_size, vocabulary]``."""

    auto = "AutoModelForMaskedLM"
    task = "fill-mask"
    output = "output"
    per_token = True
    options: SparseEmbeddingOptions

    def texts(self) -> list[Text]:
        """Return the texts of the case."""
        return [(text, None) for text in texts_of(self.case, TEXTS)]

    def head_key(self) -> Mapping[str, Any]:
        """Return what follows the logits."""
        pooling, activation = self.pooling
        return {"pooling": pooling, "activation": activation}

    @cached_property
    def pooling(self) -> tuple[str, str]:
        """The pooling over tokens and the activation, as the case or else the files say.

        Raises:
            ConfigError: ``modules.json`` does not go on with one SpladePooling.
        """
        saved: Mapping[str, Any] = {}
        if isinstance(self.source, SentenceFolder):
            further = module_list(self.source.root, self.options.route)[1:]
            if [kind for kind, _ in further] != ["SpladePooling"]:
                found = ", ".join(kind for kind, _ in further) or "nothing"
                raise ConfigError(
                    f"{self.source.root / 'modules.json'} goes on with {found}; a sparse embedding needs a"
                    " SpladePooling there, and nothing else is supported"
                )
            saved = read_object(further[0][1] / "config.json")
        pooling = self.options.pooling or saved.get("pooling_strategy", "max")
        activation = self.options.activation or saved.get("activation_function", "relu")
        if pooling not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
            raise ConfigError(f"a SpladePooling with {pooling!r} and {activation!r} is not supported")
        return pooling, activation

    def rows(self) -> TokenRows:
        """Tokenize the texts; a note says how many words encode keeps."""
        rows = replace(super().rows(), similarity=self.encode_settings.similarity or "dot")
        if not isinstance(self.source, SentenceFolder) or not os.path.lexists(self.source.root / SETTINGS):
            return rows
        most = read_object(self.source.root / SETTINGS).get("max_active_dims")
        note = f"of each text sentence-transformers keeps the {most} strongest words (max_active_dims); judged are all"
        return rows if most is None else replace(rows, notes=(*rows.notes, note))

    def head(self) -> Head:
        """Return the function on logits and mask."""
        from qeff_validate.models.sparse_embedding.pooling import splade

        return splade(*self.pooling)

    def finish(self, values: Floats) -> Floats:
        """Pool the logits ``[tokens, vocabulary]`` of one text."""
        pooling, activation = self.pooling
        weights = np.log1p(np.maximum(values, 0))
        weights = np.log1p(weights) if activation == "log1p_relu" else weights
        pooled: Floats = weights.max(axis=0) if pooling == "max" else weights.sum(axis=0)
        return pooled

    def measure(self, exact: Tensors, outputs: Tensors, inputs: TokenRows) -> Mapping[str, float]:
        """Return the worst row of each metric of vectors, and the greatest drift of a dot product."""
        rows = Rows(inputs.labels, zero_rows(exact[self.output]))
        drift = dot_error(exact[self.output], outputs[self.output], seed=self.case.seed)
        return {**worst_errors(exact, outputs, rows), "dot_error": drift.value}

    def sensitivity(self, inputs: TokenRows, reference: Tensors) -> Sequence[float]:  # noqa: ARG002
        """Return how small each text's vector is: its weights are nearest to where ReLU cuts."""
        sizes: list[float] = (-np.linalg.norm(reference[self.output].astype(np.float64), axis=1)).tolist()
        return sizes

    @cached_property
    def task_rows(self) -> TaskRows | None:
        """The case's task data by texts."""
        data = read_task_data(self.case)
        return None if data is None else rows_of_texts(data, data.texts, ())

    def task_score(self, reference: Tensors, actual: Tensors, inputs: TokenRows) -> TaskScore | None:
        """See `protocols.TaskScored`."""
        if inputs.task is None:
            return None
        score = vector_scores(self.output, inputs.similarity)
        return task_score(inputs.task, reference, actual, score, seed=self.case.seed)

    def compare(self, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare vectors, their strongest words, and their dot products."""
        from qeff_validate.models.sparse_embedding.verdict import judge_sparse

        return judge_sparse(self.output, reference, actual, inputs, context)
