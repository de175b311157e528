# SPDX-License-Identifier: Apache-2.0
"""The built-in model kinds: options, constructor, suite and metrics of each. Loads no framework."""

from __future__ import annotations

from typing import Any

from qeff_validate.comparison.metric import LOGIT_METRICS, MAXSIM_METRICS, SCORE_METRICS, SPARSE_METRICS, VECTOR_METRICS
from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.options import PeftCausalLMOptions
from qeff_validate.models.classification.options import ClassificationOptions, RerankerOptions
from qeff_validate.models.embedding.options import EmbeddingOptions
from qeff_validate.models.multi_vector.options import MultiVectorOptions
from qeff_validate.models.sparse_embedding.options import SparseEmbeddingOptions
from qeff_validate.protocols import Model, ModelKind


def _embedding(case: Case, options: EmbeddingOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.embedding.model import PooledEmbedding

    if given is not None:
        from qeff_validate.models.embedding.pooling import PooledModel

        if isinstance(given, PooledModel):
            theirs = (given.pooling, given.normalize, given.truncate_dim)
            ours = (options.pooling or "mean", bool(options.normalize), options.truncate_dim)
            if theirs != ours:
                raise ConfigError(
                    f"(pooling, normalize, truncate_dim) of the model are {theirs}, of the case {ours}: make them agree"
                )
            given = given.base_model
    return PooledEmbedding(case, options, given=given, tokenizer=tokenizer)


EMBEDDING = ModelKind(
    options=EmbeddingOptions,
    create=_embedding,
    suite="embedding",
    relations=("duplicates", "garbage_in_padding", "greater_bucket", "padding_sides", "permutation", "single_row"),
    mutants=(
        "qeff_validate.mutation.module_mutants:MODULE_MUTANTS",
        "qeff_validate.mutation.pooling_mutants:POOLING_MUTANTS",
        "qeff_validate.mutation.session_mutants:SESSION_MUTANTS",
        "qeff_validate.mutation.graph_mutants:GRAPH_MUTANTS",
    ),
    quantities=("latency",),
)


def _causal(case: Case, options: PeftCausalLMOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.causal_lm.model import PeftCausalLM

    if options.mixed_batch and not options.named() and not hasattr(given, "peft_config"):
        raise ConfigError(
            f"case {case.name!r}: mixed_batch: each row of a batch chooses an adapter, and there is none: give adapters"
            " ({name: directory}) or peft_method: lora, or leave mixed_batch out"
        )
    return PeftCausalLM(case, options, given=given, tokenizer=tokenizer)


PEFT_CAUSAL_LM = ModelKind(
    options=PeftCausalLMOptions,
    create=_causal,
    suite="peft",
    metrics=LOGIT_METRICS,
    relations=(
        *("kept_prefix", "kv_cache", "merged", "mixed_rows", "other_chunks", "other_padding", "other_slots"),
        *("poisoned_state", "row_alone", "scaled"),
    ),
    mutants=(
        "qeff_validate.mutation.module_mutants:MODULE_MUTANTS",
        "qeff_validate.mutation.causal_lm_mutants:CAUSAL_LM_MUTANTS",
        "qeff_validate.mutation.graph_mutants:GRAPH_MUTANTS",
    ),
    exporters=("dynamo",),  # TorchScript's cannot trace weights that are inputs
    stateful=True,
    quantities=("time_to_first_token", "inter_token", "adapter_swap"),
)


def _classification(case: Case, options: ClassificationOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.classification.model import SequenceClassification

    return SequenceClassification(case, options, given, tokenizer)


def _reranker(case: Case, options: RerankerOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.classification.model import Reranker

    return Reranker(case, options, given, tokenizer)


_ROWS = ("duplicates", "greater_bucket", "permutation", "single_row")
_MODULE_MUTANTS = "qeff_validate.mutation.module_mutants:MODULE_MUTANTS"
_SCORE_MUTANTS = "qeff_validate.mutation.head_mutants:SCORE_MUTANTS"

SEQUENCE_CLASSIFICATION = ModelKind(
    options=ClassificationOptions,
    create=_classification,
    suite="sequence_classification",
    metrics=SCORE_METRICS,
    relations=_ROWS,
    mutants=(_MODULE_MUTANTS, _SCORE_MUTANTS),
)

RERANKER = ModelKind(
    options=RerankerOptions,
    create=_reranker,
    suite="reranker",
    metrics=SCORE_METRICS,
    relations=_ROWS,
    mutants=(_MODULE_MUTANTS, _SCORE_MUTANTS),
)


def _sparse(case: Case, options: SparseEmbeddingOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.sparse_embedding.model import SparseEmbedding

    return SparseEmbedding(case, options, given, tokenizer)


SPARSE_EMBEDDING = ModelKind(
    options=SparseEmbeddingOptions,
    create=_sparse,
    suite="sparse_embedding",
    metrics=(*VECTOR_METRICS, *SPARSE_METRICS),
    relations=(*_ROWS, "garbage_in_padding"),
    mutants=(_MODULE_MUTANTS, "qeff_validate.mutation.head_mutants:SPARSE_MUTANTS"),
)


def _multi_vector(case: Case, options: MultiVectorOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.multi_vector.model import MultiVector

    return MultiVector(case, options, given, tokenizer)


MULTI_VECTOR = ModelKind(
    options=MultiVectorOptions,
    create=_multi_vector,
    suite="multi_vector",
    metrics=(*VECTOR_METRICS, *MAXSIM_METRICS),
    relations=(*_ROWS, "garbage_in_padding"),
    mutants=(_MODULE_MUTANTS, "qeff_validate.mutation.head_mutants:MULTI_VECTOR_MUTANTS"),
)
