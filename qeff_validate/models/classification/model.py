# SPDX-License-Identifier: Apache-2.0
"""Sequence classification and rerankers (cross-encoders): texts or pairs to one row of logits or scores each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import nan_max
from qeff_validate.comparison.score_metrics import score_errors
from qeff_validate.comparison.task_metrics import TaskScore
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import Verdict
from qeff_validate.errors import ConfigError
from qeff_validate.models.case_inputs import pairs_of, texts_of
from qeff_validate.models.classification.options import RerankerOptions
from qeff_validate.models.corpus import PAIRS, TEXTS
from qeff_validate.models.head_model import HeadModel, Text
from qeff_validate.models.sources.checkpoint import modules, read_object
from qeff_validate.models.sources.encode_settings import SETTINGS
from qeff_validate.models.sources.resolve import Folder, SentenceFolder, Source
from qeff_validate.models.sources.synthetic import Random, Tiny
from qeff_validate.models.task_data import TaskRows, read_task_data, rows_of_pairs, task_score
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import ComparisonContext, TaskScored
from qeff_validate.tensors import Tensors


class SequenceClassification(HeadModel):
    """The model kind ``sequence-classification``: ``input_ids, attention_mask → logits [batch_size, labels]``."""

    auto = "AutoModelForSequenceClassification"
    task = "sequence-classification"
    output = "logits"

    def texts(self) -> list[Text]:
        """Return the texts of the case, or its pairs."""
        if any(name.startswith("pairs") for name in self.case.inputs.given()):
            return list(pairs_of(self.case, ()))
        return [(text, None) for text in texts_of(self.case, TEXTS)]

    def head_key(self) -> Mapping[str, Any]:
        """Return nothing: the logits are the output."""
        return {}

    def head(self) -> Any:
        """Return the function that returns the logits."""
        return lambda logits, mask: logits  # noqa: ARG005

    def finish(self, values: Floats) -> Floats:
        """Return the logits."""
        return values

    def original(self) -> Any:
        """Load the model with its classifier.

        Raises:
            ConfigError: a module follows the Transformer, or the checkpoint has no classifier.
        """
        if isinstance(self.source, SentenceFolder):
            further = [kind.rpartition(".")[2] for kind, _ in modules(self.source.root)[1:]]
            if further:
                raise ConfigError(
                    f"{self.source.root / 'modules.json'} goes on with a {further[0]} module, which the model kind"
                    f" {self.case.model!r} does not support"
                )
        return super().original()

    def measure(self, exact: Tensors, outputs: Tensors, inputs: TokenRows) -> Mapping[str, float]:  # noqa: ARG002
        """Return the greatest error of a score."""
        return {"score_error": nan_max(score_errors(exact[self.output], outputs[self.output]))}

    def sensitivity(self, inputs: TokenRows, reference: Tensors) -> Sequence[float]:  # noqa: ARG002
        """Return the size of each row's greatest score, which rounding grows with."""
        sizes: list[float] = np.abs(reference[self.output]).max(axis=1).tolist()
        return sizes

    def compare(self, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare scores row by row, and the order of labels and documents."""
        from qeff_validate.models.classification.verdict import judge_scores

        return judge_scores(self.output, reference, actual, inputs, context)


class Reranker(SequenceClassification, TaskScored):
    """The model kind ``reranker``: pairs of query and document → ``scores [batch_size, labels]``."""

    output = "scores"
    options: RerankerOptions

    @cached_property
    def source(self) -> Source:
        """The source; a random head has one label unless the case's config says otherwise."""
        source = super().source
        if isinstance(source, Random | Tiny) and "num_labels" not in source.config:
            return replace(source, config={**source.config, "num_labels": 1})
        return source

    def texts(self) -> list[Text]:
        """Return the pairs of the case."""
        return list(pairs_of(self.case, PAIRS))

    def groups(self) -> tuple[int, ...]:
        """Return the number of each pair's query."""
        numbers: dict[str, int] = {}
        return tuple(numbers.setdefault(query, len(numbers)) for query, _ in self.texts())

    @cached_property
    def task_rows(self) -> TaskRows | None:
        """The case's task data; each pair is a row.

        Raises:
            ConfigError: the model gives a pair several labels.
        """
        data = read_task_data(self.case)
        if data is not None and self.source.model_config().num_labels != 1:
            raise ConfigError(
                f"case {self.case.name!r}: inputs: dataset: the model gives each pair"
                f" {self.source.model_config().num_labels} labels, and task data need one score: give pairs_file"
            )
        return None if data is None else rows_of_pairs(data, self.groups())

    def task_score(self, reference: Tensors, actual: Tensors, inputs: TokenRows) -> TaskScore | None:
        """See `protocols.TaskScored`: each query ranks the documents that it has a pair with."""

        def score(outputs: Tensors, query: int, rows: NDArray[np.int64]) -> Floats:  # noqa: ARG001
            scores: Floats = outputs[self.output][rows, 0].astype(np.float64)
            return scores

        if inputs.task is None:
            return None
        return task_score(inputs.task, reference, actual, score, seed=self.case.seed, every_document=False)

    def head_key(self) -> Mapping[str, Any]:
        """Return the activation that the case names; what the files name is part of the body's fingerprint."""
        return {"activation": self.options.activation}

    @cached_property
    def activation(self) -> str:
        """The path of the activation's class, as CrossEncoder.predict finds it."""
        if self.options.activation is not None:
            return f"torch.nn.{self.options.activation}"
        config = self.source.model_config()
        stored = self._saved_activation()
        stored = stored or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        stored = stored or getattr(config, "sbert_ce_default_activation_function", None)
        if isinstance(stored, str) and stored.startswith(
            "torch."
        ):  # code of others is not run by sentence-transformers
            return stored
        return "torch.nn.Sigmoid" if config.num_labels == 1 else "torch.nn.Identity"

    def _saved_activation(self) -> Any:
        if not isinstance(self.source, Folder):
            return None
        root = self.source.root if isinstance(self.source, SentenceFolder) else self.source.path
        return read_object(root / SETTINGS).get("activation_fn") if os.path.lexists(root / SETTINGS) else None

    def head(self) -> Any:
        """Return the function that applies the activation."""
        from qeff_validate.models.activations import activation

        activate = activation(self.activation)
        return lambda logits, mask: activate(logits)  # noqa: ARG005

    @cached_property
    def _activate(self) -> Any:
        from qeff_validate.models.activations import activation_oracle

        return activation_oracle(self.activation)

    def finish(self, values: Floats) -> Floats:
        """Apply the activation in float64."""
        scores: Floats = self._activate(values)
        return scores
