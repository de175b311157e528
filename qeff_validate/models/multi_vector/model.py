# SPDX-License-Identifier: Apache-2.0
"""ColBERT: one vector for each token, and MaxSim scores of documents for a query.

Queries and documents go through one graph, ``input_ids, attention_mask → vectors [batch_size, seq_len, dim]``. Which
vectors count is decided by the ids, outside of the graph: no padding, no tokens of the skip-list, but the tokens that a
query is filled up with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import bounds_for, relation_precision
from qeff_validate.comparison.maxsim_metrics import Texts, maxsim_errors, summed_maxsim
from qeff_validate.comparison.task_metrics import TaskScore
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import Rows, Verdict, compare, worst_errors
from qeff_validate.errors import ConfigError
from qeff_validate.models.activations import VectorFunction
from qeff_validate.models.case_inputs import pairs_of
from qeff_validate.models.corpus import PAIRS
from qeff_validate.models.head_model import HeadModel, Text
from qeff_validate.models.layer_oracle import vector_function
from qeff_validate.models.multi_vector.directory import MultiVectorModules, read_multi_vector
from qeff_validate.models.multi_vector.options import MultiVectorOptions
from qeff_validate.models.session_rows import run_rows
from qeff_validate.models.sources.encode_settings import resolve_prompt
from qeff_validate.models.sources.resolve import SentenceFolder
from qeff_validate.models.sources.synthetic import Random, Tiny
from qeff_validate.models.task_data import TaskRows, read_task_data, rows_of_texts, task_score
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import ComparisonContext, Session, TaskScored
from qeff_validate.tensors import Array, Tensors

QUERY, DOCUMENT = 0, 1
"""Groups of rows."""


class MultiVector(HeadModel, TaskScored):
    """The model kind ``multi-vector``: queries and documents → ``vectors``, one for each token that counts."""

    task = "feature-extraction"
    field = "last_hidden_state"
    output = "vectors"
    per_token = True
    options: MultiVectorOptions

    # --- files ----------------------------------------------------------------------------

    @cached_property
    def modules(self) -> MultiVectorModules:
        """What the files of the source say; nothing for a random body.

        Raises:
            ConfigError: the source is a checkpoint without a projection, or a module is not supported.
        """
        if isinstance(self.source, SentenceFolder):
            return read_multi_vector(self.source.root)
        if isinstance(self.source, Random | Tiny):
            return MultiVectorModules()
        raise ConfigError(
            f"case {self.case.name!r}: {self.case.source} names no projection: give a directory as"
            " sentence-transformers' MultiVectorEncoder saves it"
        )

    @cached_property
    def prompts(self) -> tuple[str, str]:
        """The texts before a query and before a document."""
        return self._prompt(self.options.prompt, "query"), self._prompt(self.options.document_prompt, "document")

    def _prompt(self, asked: str | None, name: str) -> str:
        settings = self.encode_settings
        return resolve_prompt(name if asked is None and name in settings.prompts else asked, settings)

    @cached_property
    def skiplist(self) -> tuple[str, ...]:
        """The tokens that do not count."""
        return self.modules.skiplist if self.options.skiplist is None else tuple(self.options.skiplist)

    def head_key(self) -> Mapping[str, Any]:
        """Return the modules on the vectors of tokens; their weights are part of the body's fingerprint."""
        drawn = {"dim": self.options.dim, "seed": self.case.seed} if isinstance(self.source, Random | Tiny) else {}
        return {"layers": [layer.key() for layer in self.modules.layers], **drawn}

    # --- rows -----------------------------------------------------------------------------

    def texts(self) -> list[Text]:
        """Return the distinct queries, and behind them the distinct documents."""
        pairs = pairs_of(self.case, PAIRS)
        return [(text, None) for side in (0, 1) for text in dict.fromkeys(pair[side] for pair in pairs)]

    def groups(self) -> tuple[int, ...]:
        """Return which rows are queries, and which documents."""
        pairs = pairs_of(self.case, PAIRS)
        return tuple(side for side in (0, 1) for _ in dict.fromkeys(pair[side] for pair in pairs))

    @cached_property
    def task_rows(self) -> TaskRows | None:
        """The case's task data; documents stand behind the queries."""
        data = read_task_data(self.case)
        return None if data is None else rows_of_texts(data, *data.sides)

    def task_score(self, reference: Tensors, actual: Tensors, inputs: TokenRows) -> TaskScore | None:
        """See `protocols.TaskScored`."""
        ends = np.cumsum([int(counts.sum()) for counts in inputs.scored])
        vectors = [slice(end - int(counts.sum()), end) for counts, end in zip(inputs.scored, ends, strict=True)]

        def score(outputs: Tensors, query: int, rows: NDArray[np.int64]) -> Floats:
            wide, parts = outputs[self.output].astype(np.float64), [vectors[row] for row in rows]
            return np.array([summed_maxsim(wide[vectors[query]], wide[part]) for part in parts], np.float64)

        return None if inputs.task is None else task_score(inputs.task, reference, actual, score, seed=self.case.seed)

    def asked(self) -> Mapping[str, Any]:
        """Return the pairs, and all that decides their tokens."""
        modules = self.modules
        return {
            **super().asked(),
            "pairs": [[*pair] for pair in pairs_of(self.case, PAIRS)],
            "prompts": [*self.prompts],
            "skiplist": [*self.skiplist],
            "skipped in": [*modules.skipped_in],
            "lengths": [modules.query_length, modules.document_length],
            "expansion": repr(modules.expansion),
        }

    def rows(self) -> TokenRows:
        """Tokenize queries and documents; raises like `HeadModel.tokenize`."""
        modules, most = self.modules, self.options.seq_len[-1]
        skipped = self._skipped_ids()
        ids: list[Array] = []
        attended: list[Array] = []
        scored: list[Array] = []
        for (text, _), side in zip(self.texts(), self.groups(), strict=True):
            tokens = np.array(self._encode(self.prompts[side] + text, None, self._limit(side))[0], dtype=np.int64)
            seen = np.ones_like(tokens)
            counts = np.ones_like(tokens)
            if ("query", "document")[side] in modules.skipped_in:
                counts = (~np.isin(tokens, skipped)).astype(np.int64)
            if side == QUERY and modules.expansion is not None:
                missing = max(0, modules.expansion.length - tokens.size)
                tokens = np.pad(tokens, (0, missing), constant_values=self._expansion_id() if missing else 0)
                seen = np.pad(seen, (0, missing), constant_values=int(modules.expansion.attend))
                counts = np.pad(counts, (0, missing), constant_values=1)
            if tokens.size > most:
                raise ConfigError(
                    f"case {self.case.name!r}: {text[:60]!r} has {tokens.size} tokens, and the greatest seq_len is"
                    f" {most}: add a seq_len of at least {tokens.size}, or set truncate: true"
                )
            ids.append(tokens)
            attended.append(seen)
            scored.append(counts)
        return TokenRows(
            ids=tuple(ids),
            pad=self.source.tokenizer()[1],
            texts=tuple(text for text, _ in self.texts()),
            per_token=True,
            groups=self.groups(),
            attended=tuple(attended) if any(not seen.all() for seen in attended) else (),
            scored=tuple(scored),
            task=self.task_rows,
        )

    def _limit(self, side: int) -> int | None:
        """Return the number of tokens that a query or a document is cut to; None: there is no limit."""
        modules = self.modules
        limits = [self.source.text_limit()] if isinstance(self.source, SentenceFolder) else []
        own = (modules.query_length, modules.document_length)[side]
        if side == QUERY and modules.expansion is not None:
            own = modules.expansion.length if modules.expansion.cut else own and max(own, modules.expansion.length)
        limits = [own] if own is not None else limits
        limits += [self.options.seq_len[-1]] if self.options.truncate else []
        return min((limit for limit in limits if limit is not None), default=None)

    def _skipped_ids(self) -> Array:
        """Return the ids of the skip-list, without words that are no single token, as in sentence-transformers."""
        tokenizer = self.source.pretrained_tokenizer()
        if tokenizer is None:
            return np.array([self.source.tokenizer()[0](word)[1] for word in self.skiplist], dtype=np.int64)
        unknown = getattr(tokenizer, "unk_token_id", None)
        ids = {word: tokenizer.convert_tokens_to_ids(word) for word in self.skiplist}
        known = [at for word, at in ids.items() if at != unknown or word == tokenizer.unk_token]
        return np.array(known, dtype=np.int64)

    def _expansion_id(self) -> int:
        """Return the id of the token that queries are filled up with."""
        tokenizer, expansion = self.source.pretrained_tokenizer(), self.modules.expansion
        assert expansion is not None
        if expansion.token is not None:
            return int(tokenizer.convert_tokens_to_ids(expansion.token))
        found = tokenizer.mask_token_id
        found = tokenizer.eos_token_id if found is None else found
        if found is None:
            raise ConfigError("query_expansion: the tokenizer has no mask token to fill queries up with")
        return int(found)

    def inputs(self, stored: Tensors) -> TokenRows:
        """Return the rows from their stored form."""
        return TokenRows.from_stored(stored, per_token=True)

    # --- model ----------------------------------------------------------------------------

    def original(self) -> Any:
        """Load the body."""
        return self.source.body()

    def head(self) -> Any:
        """Return the modules on the vectors of tokens."""
        from qeff_validate.models.multi_vector.projection import draw_projection, load_projection

        if isinstance(self.source, Random | Tiny):
            return draw_projection(self.source.model_config().hidden_size, self.options.dim, self.case.seed)
        return load_projection(self.modules.layers)

    @cached_property
    def _functions(self) -> Sequence[VectorFunction]:
        """The modules in numpy."""
        if not isinstance(self.source, Random | Tiny):
            return [vector_function(layer) for layer in self.modules.layers]
        weight = self.head().layers[0].weight.detach().double().numpy()
        return [
            lambda vectors: np.asarray(vectors @ weight.T),
            lambda vectors: np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)),
        ]

    def finish(self, values: Floats) -> Floats:
        """Project and normalize the hidden states ``[tokens, hidden]`` of one text."""
        for function in self._functions:
            values = function(values)
        return values

    def _collected(self, rows: Iterable[tuple[int, Floats]], dtype: str, inputs: TokenRows) -> Tensors:
        """Return the vectors that count, in the order of texts and tokens."""
        by_row = {row: vectors[inputs.scored[row].astype(bool)].astype(dtype) for row, vectors in rows}
        return {self.output: np.concatenate([by_row[row] for row in range(len(inputs.ids))])}

    def _pool(self, values: Floats, mask: NDArray[np.bool_]) -> Floats:  # noqa: ARG002
        """Return the vectors of all tokens, padding too: `infer` drops those that do not count."""
        return self.finish(values)

    # --- comparison -----------------------------------------------------------------------

    def infer(self, session: Session, inputs: TokenRows, reference: Tensors | None = None) -> Tensors:  # noqa: ARG002
        """Run all rows, and return the vectors that count, in the order of texts and tokens."""
        outputs = run_rows(session, inputs, batch_size=self.options.batch_size, side=self.options.padding_side)
        if not inputs.per_token:
            return outputs
        counts = np.concatenate(inputs.scored).astype(bool)
        return {name: array[counts] for name, array in outputs.items()}

    def measure(self, exact: Tensors, outputs: Tensors, inputs: TokenRows) -> Mapping[str, float]:
        """Return the worst vector of each metric of vectors, and the greatest error of a MaxSim score."""
        errors = worst_errors(exact, outputs, Rows(inputs.labels))
        scores = maxsim_errors(exact[self.output], outputs[self.output], Texts.of(inputs.scored, inputs.groups))
        return {**errors, "maxsim_error": float(scores.max())}

    def sensitivity(self, inputs: TokenRows, reference: Tensors) -> Sequence[float]:  # noqa: ARG002
        """Return the length of each text: the worst of many vectors is worse."""
        return [float(counts.sum()) for counts in inputs.scored]

    def subset(
        self, inputs: TokenRows, reference: Tensors, texts: Sequence[int]
    ) -> tuple[TokenRows, Tensors, NDArray[np.int64]]:
        """Return the inputs, the reference vectors, and the indices of these vectors, for some texts."""
        ends = np.cumsum([counts.sum() for counts in inputs.scored])
        rows = np.concatenate([np.arange(ends[text] - inputs.scored[text].sum(), ends[text]) for text in texts])
        return inputs.subset(texts), {name: array[rows] for name, array in reference.items()}, rows

    def compare(self, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare vectors, and MaxSim scores with the order that they give to documents."""
        from qeff_validate.models.multi_vector.verdict import judge_multi_vector

        return judge_multi_vector(self.output, reference, actual, inputs, context)

    def relate(self, name: str, session: Session, inputs: TokenRows, context: ComparisonContext) -> Verdict:
        """Compare both sides of a relation on whole texts: all vectors of a text are one row."""
        from qeff_validate.models.multi_vector.whole_texts import WholeTexts
        from qeff_validate.models.row_relations import RELATIONS

        rows = replace(inputs, per_token=False, scored=())
        whole = WholeTexts(session, self.output, self.options.seq_len[-1], self.options.padding_side)
        expected, actual, labels = RELATIONS[name](self, whole, rows)
        bounds = bounds_for(relation_precision(context.precision), override=context.override)
        return compare(
            expected, actual, bounds, rows=Rows(labels), seed=context.seed, precision=context.precision, relation=True
        )
