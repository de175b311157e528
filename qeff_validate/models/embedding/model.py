# SPDX-License-Identifier: Apache-2.0
"""Pooled embeddings: texts to rows of token ids, the reference, and the run over any session.

`PooledModel` is the torch module that is exported; it lives in `pooling` and is loaded on first use, so that
a run whose artifacts are all stored imports no framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import bounds_for, relation_precision, systematic_bounds
from qeff_validate.comparison.task_metrics import TaskScore
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import Rows, Verdict, compare, rows_beyond, systematic_errors, worst_errors
from qeff_validate.config.case import Artifacts, Case, Precision
from qeff_validate.config.file_precision import integer_format
from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.models.activations import VectorFunction
from qeff_validate.models.case_inputs import texts_of
from qeff_validate.models.corpus import TEXTS
from qeff_validate.models.embedding import pooling_oracle
from qeff_validate.models.embedding.options import EmbeddingOptions
from qeff_validate.models.embedding.pooling_config import PoolingConfig, published, resolve_pooling_config
from qeff_validate.models.framework_calls import with_full_attention
from qeff_validate.models.layer_oracle import vector_function
from qeff_validate.models.row_order import refuse_frequencies_by_length
from qeff_validate.models.session_rows import largest_batch, row_workloads, run_rows
from qeff_validate.models.sources.checkpoint import head_tensors
from qeff_validate.models.sources.encode_settings import EncodeSettings, resolve_prompt
from qeff_validate.models.sources.exportable_experts import make_exportable
from qeff_validate.models.sources.resolve import Folder, InMemory, SentenceFolder, Source, resolve
from qeff_validate.models.sources.static_embedding import StaticFolder
from qeff_validate.models.sources.tokenizers import Tokenize, prompted
from qeff_validate.models.task_data import TaskRows, read_task_data, rows_of_texts, task_score, vector_scores
from qeff_validate.models.token_rows import EMPTY_ROW, TokenRows, boundary_text, packed, unpacked
from qeff_validate.protocols import (
    Change,
    ComparisonContext,
    Explained,
    FaultTested,
    FileAdapted,
    FillerChecked,
    Graph,
    OriginalRun,
    Prechecked,
    Session,
    Share,
    Sharing,
    TaskScored,
    Timed,
    Workload,
)
from qeff_validate.tensors import Array, Tensors, TensorSpec


def __getattr__(name: str) -> Any:
    if name == "PooledModel":
        from qeff_validate.models.embedding.pooling import PooledModel

        return PooledModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


MOST_SPECIAL = 8
"""Texts with more distinct tokens than so many have words."""

SHARED_TOKENS = 1 << 14
"""Maximum number of tokens whose hidden states are cached for other poolings of the same body: 64 MB at width 1024."""


class PooledEmbedding(FaultTested, Prechecked, FillerChecked, FileAdapted, TaskScored, Sharing, Timed, Explained):
    """The model kind ``embedding``: ``input_ids, attention_mask → output [batch_size, hidden]``.

    Args:
        case: the case.
        options: validated options.
        given: an in-memory torch model instead of the source; left unchanged.
        tokenizer: the tokenizer of ``given``.
    """

    def __init__(self, case: Case, options: EmbeddingOptions, *, given: Any = None, tokenizer: Any = None) -> None:
        self.case = case
        self.options = options
        self._in_memory = None if given is None else InMemory(given, tokenizer)
        self.share: Share = lambda name, inputs, run: run()  # noqa: ARG005
        dims = ("batch_size", "seq_len")
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if options.token_type_ids else [])]
        shape = (*dims, "hidden") if options.pooling == "none" else ("batch_size", "hidden")
        self.graph = Graph(
            inputs=tuple(TensorSpec(name, "int64", dims) for name in names),
            outputs=(TensorSpec("output", "float32", shape),),
            buckets=tuple({"batch_size": options.batch_size, "seq_len": length} for length in options.seq_len),
        )

    @cached_property
    def source(self) -> Source:
        """The source of weights and tokenizer; resolved on first use, because stored artifacts need none."""
        return self._in_memory or resolve(self.case)

    @property
    def folder(self) -> Path | None:
        """The model's directory; None if it has none."""
        if isinstance(self.source, (SentenceFolder, StaticFolder)):
            return self.source.root
        return self.source.home if isinstance(self.source, Folder) else None

    @cached_property
    def encode_settings(self) -> EncodeSettings:
        """What the files of sentence-transformers say of texts and vectors; defaults without them."""
        return self.source.settings if isinstance(self.source, (SentenceFolder, StaticFolder)) else EncodeSettings()

    @cached_property
    def prompt(self) -> str:
        """The text that is put before every text."""
        return resolve_prompt(self.options.prompt, self.encode_settings)

    @cached_property
    def pooling_config(self) -> PoolingConfig:
        """The pooling and the modules around it, with ``auto`` resolved."""
        folder = self.folder if self.options.pooling in (None, "auto") else None
        return resolve_pooling_config(self.options, folder, self._prompt_tokens)

    def _prompt_tokens(self) -> int:
        """Return the number of tokens of the prompt, without a special token at its end."""
        if not self.prompt or isinstance(self.source, StaticFolder) or self.encode_settings.chat is not None:
            return 0  # sentence-transformers tells Pooling nothing of the prompt
        limit = self.source.text_limit() if isinstance(self.source, SentenceFolder) else None
        tokens = self.source.tokenizer()[0](self.prompt, limit)
        ends = set(getattr(self.source.pretrained_tokenizer(), "all_special_ids", ()))
        return len(tokens) - (tokens[-1] in ends)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the exported graph depends on."""
        return {**self.settings(), "body": self.source.body_key()}

    def settings(self) -> Mapping[str, Any]:
        """Return what the graph depends on besides the body."""
        return {
            "kind": "embedding",
            "head": self.pooling_config.key(),
            "inputs": [spec.name for spec in self.graph.inputs],
        }

    def inputs_key(self) -> Mapping[str, Any]:
        """Return what the token ids, and what is known of the texts, depend on."""
        task = self._task_rows
        known = {"similarity": self._similarity, **({} if task is None else {"task": task.model_dump()})}
        return {**self.asked(), "tokenizer": self.source.tokenizer_key(), **known}

    @property
    def _similarity(self) -> str:
        """How vectors are compared, as the files say."""
        return self.encode_settings.similarity or "cosine"

    @cached_property
    def _task_rows(self) -> TaskRows | None:
        """The case's task data by texts.

        Raises:
            ConfigError: there is no vector for each text.
        """
        data = read_task_data(self.case)
        if data is not None and self.options.pooling == "none":
            raise ConfigError(
                f"case {self.case.name!r}: inputs: dataset: pooling: none gives a vector for each token, and task data"
                " need one for each text: name a pooling"
            )
        return None if data is None else rows_of_texts(data, data.texts, ())

    def task_score(self, reference: Tensors, actual: Tensors, inputs: TokenRows) -> TaskScore | None:
        """See `protocols.TaskScored`."""
        if inputs.task is None:
            return None
        score = vector_scores("output", inputs.similarity)
        return task_score(inputs.task, reference, actual, score, seed=self.case.seed)

    def asked(self) -> Mapping[str, Any]:
        """Return the texts, the prompt and the length limits that are tokenized."""
        options = self.options
        limits = {"seq_len": options.seq_len, "truncate": options.truncate, "boundary": self._builtin()}
        settings = self.encode_settings
        of_files = {"lower_case": settings.lower_case, "max_seq_length": settings.max_seq_length}
        return {"texts": self._texts(), "prompt": self.prompt, **limits, **of_files}

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what identifies the tokenizer."""
        return self.source.tokenizer_key()

    def reach(self, inputs: TokenRows) -> int:  # noqa: ARG002
        """Return the number of positions that the graph needs."""
        return self.options.seq_len[-1]

    def published(self) -> Mapping[str, Any]:
        """Return the settings of sentence-transformers beside the weights: pooling, normalize, max_seq_length."""
        return published(self.folder, self.options)

    def _builtin(self) -> bool:
        return not self.case.inputs.given()

    def _texts(self) -> list[str]:
        return texts_of(self.case, TEXTS)

    def tokenize(self) -> Tensors:
        """Tokenize the texts; the built-in corpus gets additional rows at the boundary of each bucket.

        Raises:
            ConfigError: a text is longer than every bucket and ``truncate`` is off.
        """
        return replace(self.rows(), tables=self.source.tables()).stored()

    def rows(self) -> TokenRows:
        """Tokenize the texts without using stored inputs; raises like `tokenize`."""
        tokenize, pad = self._prompted_tokenizer(), self.source.tokenizer()[1]
        texts, notes = self._texts(), []
        if self._builtin():
            for length in self.options.seq_len:
                for wanted in (length - 1, length):
                    text = boundary_text(tokenize, wanted)
                    if text is None:
                        notes.append(f"no boundary row of exactly {wanted} tokens could be made with this tokenizer")
                    else:
                        texts.insert(len(texts) // 2 if wanted % 2 else len(texts), text)
        ids = [np.array(tokenize(text), dtype=np.int64) for text in texts]
        most, limit = self.options.seq_len[-1], None
        if isinstance(self.source, (SentenceFolder, StaticFolder)):
            limit = self.source.text_limit()
        cut = [row for row, tokens in enumerate(ids) if limit is not None and tokens.size > limit]
        for row in cut:
            ids[row] = np.array(tokenize(texts[row], limit), dtype=np.int64)
        if cut:
            notes.append(f"{len(cut)} of {len(texts)} texts were cut to {limit} tokens, as sentence-transformers does")
        long = [row for row, tokens in enumerate(ids) if tokens.size > most]
        if long and not self.options.truncate:
            row = long[0]
            raise ConfigError(
                f"case {self.case.name!r}: {len(long)} of {len(texts)} texts are longer than the greatest seq_len"
                f" {most}; text {row} has {ids[row].size} tokens ({texts[row][:60]!r}…):"
                f" add a seq_len of at least {max(ids[r].size for r in long)}, or set truncate: true"
            )
        notes += self._head_notes()
        empty = sum(not tokens.size for tokens in ids)
        if empty and self.pooling_config.layers:
            notes.append(
                f"{empty} of {len(texts)} texts have no token: their vectors are zeros here and are not compared;"
                " sentence-transformers gives what the modules behind the pooling make of zeros"
            )
        for row in long:
            ids[row] = np.array(tokenize(texts[row], most), dtype=np.int64)
        if long:
            notes.append(f"{len(long)} of {len(texts)} texts were cut to {most} tokens (truncate: true)")
        notes += [*self._without_bare_prompts(ids), *self._unknown_words(ids)]
        rows = [*ids, np.array([], dtype=np.int64)]
        return TokenRows(
            tuple(rows),
            pad,
            (*texts, EMPTY_ROW),
            tuple(notes),
            similarity=self._similarity,
            task=self._task_rows,
        )

    def _without_bare_prompts(self, ids: list[NDArray[np.int64]]) -> Iterator[str]:
        """Empty the rows in which nothing is left to pool, as the pooling leaves out the prompt, and say how many."""
        bare = [row for row, tokens in enumerate(ids) if 0 < tokens.size <= self.pooling_config.prompt_tokens]
        for row in bare:
            ids[row] = np.array([], dtype=np.int64)
        if bare:
            yield (
                f"{len(bare)} of {len(ids)} texts have no token behind the prompt, which the pooling leaves out:"
                " there is no vector to compare"
            )

    def _unknown_words(self, ids: Sequence[NDArray[np.int64]]) -> Iterator[str]:
        """Say that the tokenizer knows no word of any text, as the empty one of missing files does."""
        tokens = set(np.concatenate(ids).tolist())
        if not isinstance(self.source, SentenceFolder) or not 0 < len(tokens) <= MOST_SPECIAL:
            return
        tokenizer = self.source.pretrained_tokenizer()
        if tokenizer is None or tokens <= set(tokenizer.all_special_ids):
            yield "the tokenizer knows no word of any text: each is the unknown token; are its files complete?"

    def _prompted_tokenizer(self) -> Tokenize:
        if isinstance(self.source, SentenceFolder):
            return self.source.prompted_tokenizer(self.prompt)
        return prompted(self.source.tokenizer()[0], self.prompt)

    def _head_notes(self) -> Iterator[str]:
        """Say what the directory says and the verdict leaves out: a task head, half precision."""
        kept = self.source.computes_in() if isinstance(self.source, SentenceFolder | StaticFolder) else "float32"
        if kept != "float32":
            yield (
                f"sentence-transformers loads this directory in {kept} and computes in it; the reference computes in"
                " float32 with the same weights, so encode differs from it by rounding"
            )
        if not isinstance(self.source, Folder):
            return
        architecture, head = head_tensors(self.source.path)
        if head:
            names = f"{', '.join(head[:3])}{f' and {len(head) - 3} more' if len(head) > 3 else ''}"
            yield (
                f"the checkpoint is a {architecture}, and its head ({names}) is no part of an embedding: what is judged"
                " is the body alone"
            )

    def _body(self) -> Any:
        """Load the body, with the modules on its token vectors."""
        body = with_full_attention(self.source.body())
        if not self.pooling_config.token_layers:
            return body
        from qeff_validate.models.layers import token_body

        return token_body(body, self.pooling_config.token_layers)

    def _pool_row(self, tokens: Floats, dtype: str) -> Floats:
        """Pool the token vectors ``[n, hidden]`` of one row."""
        config = self.pooling_config
        if config.custom:
            from qeff_validate.models.embedding.reference import pooled_alone

            return pooled_alone(config.pooling, tokens, dtype)
        return pooling_oracle.pool_row(tokens, config.poolings, config.prompt_tokens)

    @cached_property
    def _vector_functions(self) -> Sequence[VectorFunction]:
        return [vector_function(layer) for layer in self.pooling_config.layers]

    def _finish(self, vectors: Floats) -> Floats:
        """Apply what follows the pooling."""
        config = self.pooling_config
        for function in self._vector_functions:
            vectors = function(vectors)
        return pooling_oracle.finish(vectors, normalize=config.normalize, truncate_dim=config.truncate_dim)

    def _share_name(self, name: str) -> str:
        """Return a name that tells hidden states behind modules on token vectors apart from the body's own."""
        layers = [layer.key() for layer in self.pooling_config.token_layers]
        return f"{name} {json.dumps(layers, sort_keys=True)}" if layers else name

    def inputs(self, stored: Tensors) -> TokenRows:
        """Return the rows from their stored form."""
        return TokenRows.from_stored(stored, per_token=self.options.pooling == "none")

    def interface(self, inputs: TokenRows) -> Graph:  # noqa: ARG002
        """Return the interface of the exported graph, which depends on the options only."""
        return self.graph

    def module(self) -> tuple[Any, Tensors]:
        """Load the body and wrap it with the pooling; the example shapes differ from every bucket on purpose."""
        from qeff_validate.models.embedding.pooling import PooledModel
        from qeff_validate.models.layers import load_layer

        body = self._body()
        make_exportable(body)
        ids = np.arange(2 * 7, dtype=np.int64).reshape(2, 7) % 5 + 1
        mask = np.ones((2, 7), dtype=np.int64)
        mask[1, 4:] = 0
        config = self.pooling_config
        module = PooledModel(
            body,
            config.pooling,
            normalize=config.normalize,
            truncate_dim=config.truncate_dim,
            shorter=self.options.truncate_dim is not None,
            layers=[load_layer(layer) for layer in config.layers],
            prompt_tokens=config.prompt_tokens,
        ).eval()
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return module, {spec.name: known[spec.name] for spec in self.graph.inputs}

    def reference(self, inputs: TokenRows, *, dtype: str) -> Tensors:
        """Run the original body on unpadded rows, and pool with the numpy oracle.

        A custom pooling defines its own result: it is run on each unpadded row alone, so that effects of padding and of
        other rows are detected, but not errors of its formula.

        Returns:
            ``output`` [rows, hidden] in ``dtype``; rows without a token hold zeros, or are left out per token.

        Raises:
            UnstableReferenceError: the result of a row depends on rows that were run before or beside it.
        """
        refuse_frequencies_by_length(inputs.tables, [row.size for row in inputs.ids if row.size])
        return self._pooled(self._states(inputs, dtype), inputs, dtype)

    def _states(self, inputs: TokenRows, dtype: str) -> Iterable[tuple[int, Floats]]:
        from qeff_validate.models.embedding.reference import hidden_states, refuse_padding

        def run() -> Iterator[tuple[int, Floats]]:
            body = self._body()
            yield from hidden_states(body, inputs.ids, dtype, inputs.texts)
            if dtype == "float32" and self.options.padding_side == "right":
                refuse_padding(body, inputs.ids, inputs.pad)

        if sum(ids.size for ids in inputs.ids) > SHARED_TOKENS:
            return run()
        stored = self.share(self._share_name(f"reference in {dtype}"), inputs, lambda: {"states": packed(run(), dtype)})
        return unpacked(stored["states"], inputs.ids)

    def ensemble(self, inputs: TokenRows, reference: Tensors, precision: Precision) -> Iterator[Tensors]:  # noqa: ARG002
        """Yield the output of `reference` with the body in the precision, for each variant of `ENSEMBLE`."""
        if precision.kv is not None:
            raise ConfigError(f"case {self.case.name!r}: precision.kv: an embedding keeps no keys and values")
        beyond = ", float32 beyond its range" if precision.beyond_range else ""
        integers = integer_format(precision)
        name = self._share_name(f"ensemble in {precision.profile}{beyond}{f' as {integers}' if integers else ''}")
        runs = self.share(name, inputs, lambda: self._ensemble_states(inputs, precision))
        pooled = [
            {row: self._pool_row(tokens, "float32") for row, tokens in unpacked(runs[variant], inputs.ids)}
            for variant in sorted(runs)
        ]
        half = precision.compute == "fp16"
        for vectors in self._emulated_heads(pooled, precision):
            outputs = self._collected(vectors, inputs, "float32")
            yield {
                name: array.astype(np.float16).astype(np.float32) if half else array for name, array in outputs.items()
            }

    def _emulated_heads(
        self, pooled: Sequence[dict[int, Floats]], precision: Precision
    ) -> Iterator[Mapping[int, Floats]]:
        """Yield what follows the pooling in each variant, computed in the precision."""
        config = self.pooling_config
        if not config.layers and not config.normalize:
            yield from ({row: self._finish(vector) for row, vector in vectors.items()} for vectors in pooled)
            return
        from qeff_validate.models.embedding.vector_head import VectorHead, emulated_head
        from qeff_validate.models.layers import load_layer

        layers = [load_layer(layer) for layer in config.layers]
        head = VectorHead(layers, config.truncate_dim, normalize=config.normalize).eval()
        rows = list(pooled[0])
        sizes = [pooled[0][row][..., 0].size for row in rows]
        stacked = [np.concatenate([np.atleast_2d(vectors[row]) for row in rows]) for vectors in pooled]
        for vectors in emulated_head(head, stacked, precision):
            parts = np.split(vectors, np.cumsum(sizes)[:-1])
            yield {row: part.reshape(*pooled[0][row].shape[:-1], -1) for row, part in zip(rows, parts, strict=True)}

    def _ensemble_states(self, inputs: TokenRows, precision: Precision) -> Tensors:
        from qeff_validate.models.embedding.reference import batched_states
        from qeff_validate.models.emulation.ensemble import run_ensemble
        from qeff_validate.models.emulation.float64 import is_large
        from qeff_validate.models.emulation.integers import compressed_weights
        from qeff_validate.models.emulation.precision import (
            ComputationVariant,
            InPlaceRoundedWeights,
            RoundedWeights,
        )

        def run(replica: Any, variant: ComputationVariant) -> Array:
            return packed(batched_states(replica, inputs.ids, inputs.pad, variant.batch).items(), "float32")

        body, compute = self._body(), precision.compute
        compressed = compressed_weights(body, precision)
        # this body is not shared, so it may be rounded in place, unless something needs the unrounded weights
        beyond_range = precision.beyond_range is not None
        in_place, large = not compressed and not beyond_range and compute != "fp32", is_large(body)
        weights = (
            InPlaceRoundedWeights(compute, body, large=large)
            if in_place
            else RoundedWeights(compute, large=large, beyond_range=beyond_range)
        )
        runs = run_ensemble(body, compute, run, weights=weights, compressed=compressed)
        return {str(index): states for index, states in enumerate(runs)}

    def faulty_runs(
        self, inputs: TokenRows, reference: Tensors, changes: Iterable[Change], dtype: str = "float32"
    ) -> Iterator[tuple[str, Tensors]]:
        """Yield the vectors of the original model with each fault."""
        changes = list(changes)
        outputs: list[tuple[str, Tensors]] = []

        def run() -> Tensors:
            states: dict[str, Array] = {}
            outputs.extend(self._altered(inputs, reference, changes, dtype, states))
            return states

        name = self._share_name(f"faults in {dtype}: {', '.join(change.name for change in changes)}")
        states = self.share(name, inputs, run)
        yield from outputs or self._altered(inputs, reference, changes, dtype, dict(states))

    def _altered(
        self, inputs: TokenRows, reference: Tensors, changes: Iterable[Change], dtype: str, states: dict[str, Array]
    ) -> Iterator[tuple[str, Tensors]]:
        from qeff_validate.models.embedding.reference import unpadded_states
        from qeff_validate.models.embedding.reference_session import OriginalSession
        from qeff_validate.models.emulation.float64 import compute_in_dtype, one_thread_if_small

        pool = partial(self._pool_row, dtype=dtype)
        parts = len(self.pooling_config.poolings)
        original = OriginalSession(self._body(), self.graph, pool, self._finish, dtype, states, parts)
        longest = max(inputs.ids, key=len)[None]
        probe = partial(original.run, {spec.name: np.ones_like(longest) for spec in self.graph.inputs})
        with one_thread_if_small(original.body), compute_in_dtype(original.body, dtype, probe=probe):
            for change in changes:
                original.pooling_override, session = None, cast("Session", original)
                with suppress(ValidateError), change.applied_to(original.body):
                    if change.level == "body":
                        if change.name not in states:
                            states[change.name] = packed(unpadded_states(original.body, inputs.ids), dtype)
                        yield change.name, self._pooled(unpacked(states[change.name], inputs.ids), inputs, dtype)
                        continue
                    if change.level == "pooling":
                        original.pooling_override = change.change
                    elif change.level == "session":
                        session = change.change(original)
                    yield change.name, self.infer(session, inputs, reference)

    def _pooled(self, states: Iterable[tuple[int, Floats]], inputs: TokenRows, dtype: str) -> Tensors:
        return self._collected(
            {row: self._finish(self._pool_row(tokens, dtype)) for row, tokens in states}, inputs, dtype
        )

    @staticmethod
    def _collected(by_row: Mapping[int, Floats], inputs: TokenRows, dtype: str) -> Tensors:
        """Return the output from the vectors of the rows with a token, in any order."""
        vectors = {row: values.astype(dtype) for row, values in by_row.items()}
        if inputs.per_token:
            return {"output": np.concatenate([vectors[row] for row in sorted(vectors)])}
        empty = np.zeros_like(next(iter(vectors.values())))
        return {"output": np.stack([vectors.get(row, empty) for row in range(len(inputs.ids))])}

    def measure(self, exact: Tensors, outputs: Tensors, inputs: TokenRows) -> Mapping[str, float]:
        """Return the worst row of each row metric."""
        return worst_errors(exact, outputs, Rows(inputs.labels, inputs.tokenless))

    def systematic_errors(self, center: Tensors, outputs: Tensors, inputs: TokenRows) -> Mapping[str, float]:
        """Return the systematic errors of vectors."""
        return systematic_errors(center, outputs, Rows(inputs.labels, inputs.tokenless))

    def sensitivity(self, inputs: TokenRows, reference: Tensors) -> Sequence[float]:
        """Return how much the hidden states of a row cancel in their mean; with many tokens, how short its vector is.

        The former does not depend on the pooling, so that poolings of one body share their ensemble.
        """
        if sum(ids.size for ids in inputs.ids) > SHARED_TOKENS:
            return list(-np.linalg.norm(reference["output"].astype(np.float64), axis=1))
        values = dict.fromkeys(range(len(inputs.ids)), 0.0)
        for row, states in self._states(inputs, "float32"):
            values[row] = float(np.sqrt(np.mean(np.square(states))) / np.linalg.norm(states.mean(axis=0)))
        return list(values.values())

    def subset(
        self, inputs: TokenRows, reference: Tensors, texts: Sequence[int]
    ) -> tuple[TokenRows, Tensors, NDArray[np.int64]]:
        """Return the inputs, the reference vectors, and the indices of these vectors, for some texts."""
        rows = np.array(texts, dtype=np.int64)
        if inputs.per_token:
            ends = np.cumsum([ids.size for ids in inputs.ids])
            rows = np.concatenate([np.arange(ends[text] - inputs.ids[text].size, ends[text]) for text in texts])
        return inputs.subset(texts), {name: array[rows] for name, array in reference.items()}, rows

    def judge(self, reference: Tensors, actual: Tensors, inputs: TokenRows, context: ComparisonContext) -> Verdict:
        """Compare vectors row by row."""
        from qeff_validate.models.padding_hint import padding_hint

        bounds = bounds_for(context.precision, floor=context.floor, override=context.override)
        if context.device and context.floor is not None:
            bounds = systematic_bounds(context.floor) | bounds
        rows = Rows(inputs.labels, inputs.tokenless, zeros=context.ours, reached=context.reached)
        verdict = compare(
            reference, actual, bounds, rows=rows, floor=context.floor, seed=context.seed, precision=context.precision,
            similarity=inputs.similarity,
        )  # fmt: skip
        if verdict.status != "fail" or not verdict.metrics or inputs.per_token:
            return verdict
        hint = padding_hint(
            rows_beyond(reference, actual, bounds, rows), context.padded, rows.with_tokens(), actual, context.precision
        )
        return replace(verdict, reason=f"{hint}; {verdict.reason}") if hint else verdict

    def reached(self, session: Session, inputs: TokenRows, actual: Tensors) -> tuple[Sequence[int], Sequence[str]]:
        """See `protocols.FillerChecked`."""
        from qeff_validate.models.embedding.filler_rows import rows_reached

        if inputs.per_token or any(len(array) != len(inputs.ids) for array in actual.values()):
            return (), ()
        return rows_reached(partial(self.infer, session), inputs, self._batch_size(session), actual)

    def relate(self, name: str, session: Session, inputs: TokenRows, context: ComparisonContext) -> Verdict:
        """Compare both sides of one of `RELATIONS` on the rows with at least one token."""
        from qeff_validate.models.embedding.relations import RELATIONS
        from qeff_validate.models.row_relations import with_tokens

        expected, actual, labels = RELATIONS[name](self, session, with_tokens(inputs))
        # both runs read the same compressed weights
        bounds = bounds_for(relation_precision(context.precision), override=context.override)
        return compare(
            expected, actual, bounds, rows=Rows(labels), seed=context.seed, precision=context.precision, relation=True,
            similarity=inputs.similarity,
        )  # fmt: skip

    def infer(self, session: Session, inputs: TokenRows, reference: Tensors | None = None) -> Tensors:  # noqa: ARG002
        """Run all rows in batches of the case's size, each padded to the smallest shape that fits it.

        Raises:
            RunError: no allowed shape of the session fits, or an output has lost its rows.
        """
        return run_rows(session, inputs, batch_size=self.options.batch_size, side=self.options.padding_side)

    def original_run(
        self,
        inputs: TokenRows,
        reference: Tensors,  # noqa: ARG002
        sizes: Mapping[str, int],
        row: int,  # noqa: ARG002
    ) -> OriginalRun:
        """Return one run of the original body on some rows, pooled by the numpy oracle."""
        from qeff_validate.models.embedding.original_run import original_run

        pool = partial(self._pool_row, dtype="float64")
        side, parts = self.options.padding_side, len(self.pooling_config.poolings)
        return original_run(
            self._body(), self.graph, inputs, sizes, pool=pool, finish=self._finish, side=side, parts=parts
        )

    def text_of_row(self, inputs: TokenRows, reference: Tensors, row: int) -> int:  # noqa: ARG002
        """Return the row; without pooling, the text of a token."""
        if not inputs.per_token:
            return row
        return int(np.searchsorted(np.cumsum([ids.size for ids in inputs.ids]), row, side="right"))

    def adapt(self, session: Session, artifacts: Artifacts) -> tuple[Session, Sequence[str]]:
        """See `protocols.FileAdapted`: hidden states are pooled by the numpy oracle."""
        from qeff_validate.models.embedding.file_session import completed

        key = self.pooling_config.key() if len(self.graph.outputs[0].shape) == 2 else {"pooling": "none"}
        behind = [layer.kind for layer in self.pooling_config.layers] + (["Normalize"] if key.get("normalize") else [])
        words = ", ".join([str(key["pooling"]), *behind])
        return completed(
            session, self.graph, artifacts, lambda tokens: self._finish(self._pool_row(tokens, "float32")), words
        )

    def workloads(self, session: Session, inputs: TokenRows) -> Sequence[Workload]:
        """Return one full batch, without padding, for each length and batch size that the session takes."""
        options = self.options
        return row_workloads(session, inputs, options.seq_len, options.batch_size, options.padding_side)

    def _batch_size(self, session: Session) -> int:
        return largest_batch(session, self.options.batch_size)
