# SPDX-License-Identifier: Apache-2.0
"""A base class for model kinds that judge a transformers model with its head: rows of tokens in, one output.

A kind says which Auto class loads its model, how texts become rows, and what follows the model: once as a torch
function that is exported, once in numpy for the reference. Loads no framework.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import relation_precision
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import Verdict
from qeff_validate.config.case import Case, Precision
from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.models.framework_calls import with_full_attention
from qeff_validate.models.row_options import HeadOptions
from qeff_validate.models.row_order import refuse_frequencies_by_length
from qeff_validate.models.session_rows import row_workloads, run_rows
from qeff_validate.models.sources.encode_settings import EncodeSettings, resolve_prompt
from qeff_validate.models.sources.exportable_experts import make_exportable
from qeff_validate.models.sources.resolve import InMemory, SentenceFolder, Source, resolve
from qeff_validate.models.sources.tokenizers import TokenizePair, join_pairs, tokenize_pairs_with
from qeff_validate.models.task_data import TaskRows
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import Change, ComparisonContext, FaultTested, Graph, Prechecked, Session, Timed, Workload
from qeff_validate.tensors import Tensors, TensorSpec

Text = tuple[str, str | None]
"""A text, or a pair of texts."""


class HeadModel(FaultTested, Prechecked, Timed):
    """Defaults for a model with a head.

    Args:
        case: the case.
        options: validated options.
        given: an in-memory transformers model with its head instead of the source; left unchanged.
        tokenizer: the tokenizer of ``given``.
    """

    auto: ClassVar[str]
    """The Auto class of transformers that loads the model."""
    task: ClassVar[str]
    """What sentence-transformers' files call that."""
    field: ClassVar[str] = "logits"
    """The model's output that the head's function reads."""
    output: ClassVar[str]
    """The name of the graph's output."""
    per_token: ClassVar[bool] = False
    """The model gives one vector for each token, not for each row."""

    def __init__(self, case: Case, options: HeadOptions, given: Any = None, tokenizer: Any = None) -> None:
        self.case, self.options = case, options
        self._in_memory = None if given is None else InMemory(given, tokenizer)

    # --- what a kind says -----------------------------------------------------------------

    @abstractmethod
    def head(self) -> Any:
        """Return the torch function on (model output, mask ``[batch, seq]``) that is exported behind the model."""

    @abstractmethod
    def finish(self, values: Floats) -> Floats:
        """Return the output ``[d]`` of one row from the model's, ``[labels]`` or ``[tokens, …]``, in numpy."""

    @abstractmethod
    def texts(self) -> list[Text]:
        """Return what is tokenized."""

    @abstractmethod
    def head_key(self) -> Mapping[str, Any]:
        """Return plain data that identifies what follows the model."""

    # --- source and tokens ----------------------------------------------------------------

    @cached_property
    def source(self) -> Source:
        """The source of weights and tokenizer; resolved on first use, because stored artifacts need none."""
        source = self._in_memory or resolve(self.case)
        return replace(source, task=self.task) if isinstance(source, SentenceFolder) else source

    @cached_property
    def encode_settings(self) -> EncodeSettings:
        """What the files of sentence-transformers say of texts; defaults without them.

        Raises:
            ConfigError: texts become messages of a chat.
        """
        settings = self.source.settings if isinstance(self.source, SentenceFolder) else EncodeSettings()
        if settings.chat is not None:
            raise ConfigError(
                f"case {self.case.name!r}: the files of {self.case.source} put texts into the tokenizer's chat template"
                f" (modality_config: message), which the model kind {self.case.model!r} does not support"
            )
        return settings

    @cached_property
    def prompt(self) -> str:
        """The text that is put before every text."""
        return resolve_prompt(self.options.prompt, self.encode_settings)

    @cached_property
    def _encode(self) -> TokenizePair:
        pretrained = self.source.pretrained_tokenizer()
        if pretrained is None:
            return join_pairs(self.source.tokenizer()[0])
        return tokenize_pairs_with(pretrained, lower_case=self.encode_settings.lower_case)

    @property
    def _has_pairs(self) -> bool:
        return any(other is not None for _, other in self.texts())

    @cached_property
    def _has_types(self) -> bool:
        """Say whether the tokenizer tells the texts of a pair apart, and the model reads that."""
        if not self._has_pairs:
            return False
        config = self.source.model_config()
        if getattr(config, "type_vocab_size", 2) < 2 or "token_type_ids" not in self._arguments(config):
            return False
        return any(self._encode("a", "b")[1])

    def _arguments(self, config: Any) -> Collection[str]:
        """Return the names of the arguments of the model's forward; none if there is no such model."""
        import inspect

        import transformers

        if self._in_memory is not None:
            return inspect.signature(self._in_memory.model.forward).parameters
        try:
            model = getattr(transformers, self.auto)._model_mapping[type(config)]
        except KeyError:  # loading will raise the error with a reason
            return ()
        return inspect.signature(model.forward).parameters

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the exported graph depends on."""
        return {**self.settings(), "body": self.source.body_key()}

    def settings(self) -> Mapping[str, Any]:
        """Return what the graph depends on besides the body."""
        return {
            "kind": self.case.model,
            "head of the model": self.head_key(),
            "output": self.output,
            **({"tokenizer": self.source.tokenizer_key()} if self._has_pairs else {}),  # it says if types are an input
        }

    def inputs_key(self) -> Mapping[str, Any]:
        """Return what the token ids depend on."""
        task = self.task_rows
        of_task = {} if task is None else {"task": task.model_dump()}
        return {**self.asked(), "tokenizer": self.source.tokenizer_key(), "body": self.source.body_key(), **of_task}

    def asked(self) -> Mapping[str, Any]:
        """Return the texts or pairs, the prompt and the length limits that are tokenized."""
        texts, settings = self.texts(), self.encode_settings
        pairs = [[text, other] for text, other in texts if other is not None]
        return {
            "texts": [_label(text) for text in texts],
            **({"pairs": pairs} if pairs else {}),
            "prompt": self.prompt,
            "seq_len": self.options.seq_len,
            "truncate": self.options.truncate,
            "lower_case": settings.lower_case,
            "max_seq_length": settings.max_seq_length,
        }

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what identifies the tokenizer."""
        return self.source.tokenizer_key()

    def reach(self, inputs: TokenRows) -> int:  # noqa: ARG002
        """Return the number of positions that the graph needs."""
        return self.options.seq_len[-1]

    def published(self) -> Mapping[str, Any]:
        """Return the length limit of sentence-transformers' files, if there is one."""
        limit = self.encode_settings.max_seq_length
        return {} if limit is None else {"max_seq_length": limit}

    def tokenize(self) -> Tensors:
        """Tokenize the texts.

        Raises:
            ConfigError: a text is longer than every bucket and ``truncate`` is off.
        """
        return replace(self.rows(), tables=self.source.tables()).stored()

    def rows(self) -> TokenRows:
        """Tokenize the texts without using stored inputs; raises like `tokenize`."""
        texts, most = self.texts(), self.options.seq_len[-1]
        prompted = [(self.prompt + text, other) for text, other in texts]
        encoded = [self._encode(*text) for text in prompted]
        notes: list[str] = []
        limit = self.source.text_limit() if isinstance(self.source, SentenceFolder) else None
        for length, whose in ((limit, "as sentence-transformers does"), (most, "truncate: true")):
            long = [row for row, (ids, _) in enumerate(encoded) if length is not None and len(ids) > length]
            if not long:
                continue
            if length == most and length != limit and not self.options.truncate:
                longest = max(len(encoded[row][0]) for row in long)
                raise ConfigError(
                    f"case {self.case.name!r}: {len(long)} of {len(texts)} texts are longer than the greatest seq_len"
                    f" {most}; text {long[0]} has {len(encoded[long[0]][0])} tokens ({_label(texts[long[0]])[:60]!r}…):"
                    f" add a seq_len of at least {longest}, or set truncate: true"
                )
            for row in long:
                encoded[row] = self._encode(*prompted[row], length)
            notes.append(f"{len(long)} of {len(texts)} texts were cut to {length} tokens ({whose})")
        return TokenRows(
            ids=tuple(np.array(ids, dtype=np.int64) for ids, _ in encoded),
            pad=self.source.tokenizer()[1],
            texts=tuple(map(_label, texts)),
            notes=tuple(notes),
            types=tuple(np.array(types, dtype=np.int64) for _, types in encoded) if self._has_types else (),
            groups=self.groups(),
            task=self.task_rows,
        )

    @cached_property
    def task_rows(self) -> TaskRows | None:
        """The case's task data by rows; a kind that scores no pairs of texts refuses them.

        Raises:
            ConfigError: it does.
        """
        if self.case.inputs.dataset is not None:
            raise ConfigError(
                f"case {self.case.name!r}: inputs: dataset: the model kind {self.case.model!r} gives pairs of texts no"
                " score: give texts or texts_file"
            )
        return None

    def groups(self) -> tuple[int, ...]:
        """Return the number of each text's group; by default there are none."""
        return ()

    def inputs(self, stored: Tensors) -> TokenRows:
        """Return the rows from their stored form."""
        return TokenRows.from_stored(stored)

    # --- graph and module -----------------------------------------------------------------

    def interface(self, inputs: TokenRows) -> Graph:
        """Return the interface of the exported graph; token types are an input if the rows have some."""
        dims = ("batch_size", "seq_len")
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if inputs.types else [])]
        shape = (*dims, "hidden") if inputs.per_token else ("batch_size", "hidden")
        return Graph(
            inputs=tuple(TensorSpec(name, "int64", dims) for name in names),
            outputs=(TensorSpec(self.output, "float32", shape),),
            buckets=tuple(
                {"batch_size": self.options.batch_size, "seq_len": length} for length in self.options.seq_len
            ),
        )

    def original(self) -> Any:
        """Load the original model in float32 and eval mode."""
        return with_full_attention(self.source.with_head(self.auto))

    def module(self) -> tuple[Any, Tensors]:
        """Load the model and the function behind it; the example shapes differ from every bucket on purpose."""
        from qeff_validate.models.head_module import HeadModule

        model = self.original()
        make_exportable(model)
        ids = np.arange(2 * 7, dtype=np.int64).reshape(2, 7) % 5 + 1
        mask = np.ones((2, 7), dtype=np.int64)
        mask[1, 4:] = 0
        types = np.zeros_like(ids)
        types[:, 3:] = 1
        examples = {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": types} if self._has_types else {})}
        return HeadModule(model, self.head(), self.field).eval(), examples

    # --- reference ------------------------------------------------------------------------

    def reference(self, inputs: TokenRows, *, dtype: str) -> Tensors:
        """Run the original model on unpadded rows, and what follows it in numpy.

        Raises:
            UnstableReferenceError: the result of a row depends on rows that were run before or beside it.
        """
        from qeff_validate.models.head_module import read_output
        from qeff_validate.models.original_rows import unpadded_outputs

        refuse_frequencies_by_length(inputs.tables, [row.size for row in inputs.ids])
        run = partial(read_output, self.field)
        outputs = unpadded_outputs(
            self.original(), run, inputs.ids, dtype,
            labels=inputs.texts, types=inputs.types, attended=inputs.attended, per_token=self.per_token,
        )  # fmt: skip
        return self._collected(((row, self.finish(values)) for row, values in outputs), dtype, inputs)

    def _collected(self, rows: Iterable[tuple[int, Floats]], dtype: str, inputs: TokenRows) -> Tensors:
        """Return the output from those of the rows, in any order."""
        by_row = dict(rows)
        return {self.output: np.stack([by_row[row].astype(dtype) for row in range(len(inputs.ids))])}

    def ensemble(self, inputs: TokenRows, reference: Tensors, precision: Precision) -> Iterator[Tensors]:  # noqa: ARG002
        """Yield the output with model and head in the precision, for each variant of `ENSEMBLE`."""
        from qeff_validate.models.emulation.ensemble import run_ensemble
        from qeff_validate.models.emulation.float64 import is_large
        from qeff_validate.models.emulation.integers import compressed_weights
        from qeff_validate.models.emulation.precision import ComputationVariant, RoundedWeights
        from qeff_validate.models.head_module import HeadModule, run_module
        from qeff_validate.models.original_rows import batched_outputs
        from qeff_validate.models.token_rows import together

        if precision.kv is not None:
            raise ConfigError(f"case {self.case.name!r}: precision.kv: this kind of model keeps no keys and values")
        half = precision.compute == "fp16"
        model = HeadModule(self.original(), self.head(), self.field).eval()

        def run(replica: Any, variant: ComputationVariant) -> Tensors:
            outputs = batched_outputs(
                replica, run_module, inputs.ids, together(inputs.ids, variant.batch), pad=inputs.pad,
                types=inputs.types, attended=inputs.attended, per_token=inputs.per_token,
            )  # fmt: skip
            return self._collected(outputs, "float32", inputs)

        compressed = compressed_weights(model, precision)
        beyond_range = precision.beyond_range is not None
        weights = RoundedWeights(precision.compute, large=is_large(model), beyond_range=beyond_range)
        for outputs in run_ensemble(model, precision.compute, run, weights=weights, compressed=compressed):
            yield {
                name: array.astype(np.float16).astype(np.float32) if half else array for name, array in outputs.items()
            }

    def faulty_runs(
        self, inputs: TokenRows, reference: Tensors, changes: Iterable[Change], dtype: str = "float32"
    ) -> Iterator[tuple[str, Tensors]]:
        """Yield the outputs of the original model with each fault."""
        from qeff_validate.models.emulation.float64 import compute_in_dtype, one_thread_if_small
        from qeff_validate.models.head_module import OriginalWithHead

        original = OriginalWithHead(self.original(), self.interface(inputs), self.field, self._pool, dtype)
        longest = max(inputs.ids, key=len)[None]
        probe = partial(original.run, {spec.name: np.ones_like(longest) for spec in original.inputs})
        with one_thread_if_small(original.model), compute_in_dtype(original.model, dtype, probe=probe):
            for change in changes:
                original.head_override, session = None, cast("Session", original)
                with suppress(ValidateError), change.applied_to(original.model):
                    if change.level == "pooling":
                        original.head_override = change.change
                    elif change.level == "session":
                        session = change.change(original)
                    yield change.name, self.infer(session, inputs, reference)

    def _pool(self, values: Floats, mask: NDArray[np.bool_]) -> Floats:
        """Return the output of one row of a batch; per token, padding holds zeros."""
        if not self.per_token:
            return self.finish(values)
        finished = self.finish(values[mask])
        if finished.ndim == 1:
            return finished
        padded = np.zeros((len(mask), finished.shape[1]))
        padded[mask] = finished
        return padded

    def systematic_errors(self, center: Tensors, outputs: Tensors, inputs: TokenRows) -> Mapping[str, float]:  # noqa: ARG002
        """Return no systematic errors: their metrics are for vectors of one length."""
        return {}

    def subset(
        self, inputs: TokenRows, reference: Tensors, texts: Sequence[int]
    ) -> tuple[TokenRows, Tensors, NDArray[np.int64]]:
        """Return the inputs, the reference outputs, and the indices of these, for some texts."""
        rows = np.array(texts, dtype=np.int64)
        return inputs.subset(texts), {name: array[rows] for name, array in reference.items()}, rows

    # --- runs -----------------------------------------------------------------------------

    def infer(self, session: Session, inputs: TokenRows, reference: Tensors | None = None) -> Tensors:  # noqa: ARG002
        """Run all rows in batches of the case's size, each padded to the smallest shape that fits it.

        Raises:
            RunError: no allowed shape of the session fits, or an output has lost its rows.
        """
        return run_rows(session, inputs, batch_size=self.options.batch_size, side=self.options.padding_side)

    def workloads(self, session: Session, inputs: TokenRows) -> Sequence[Workload]:
        """Return one full batch, without padding, for each length and batch size that the session takes."""
        options = self.options
        return row_workloads(session, inputs, options.seq_len, options.batch_size, options.padding_side)

    def relate(self, name: str, session: Session, inputs: TokenRows, context: ComparisonContext) -> Verdict:
        """Compare both sides of a relation of `row_relations`; the same compressed weights are read in both runs."""
        from qeff_validate.models.row_relations import RELATIONS

        expected, actual, labels = RELATIONS[name](self, session, inputs)
        rows = replace(inputs, texts=tuple(labels), ids=(), types=(), groups=())
        same = replace(context, precision=relation_precision(context.precision), floor=None)
        return self.compare(expected, actual, rows, same)

    @abstractmethod
    def compare(self, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare outputs with the reference, or two runs of one session; rows are those of ``inputs.labels``."""

    def judge(self, reference: Tensors, actual: Tensors, inputs: TokenRows, context: ComparisonContext) -> Verdict:
        """Compare what a runtime gave with the reference."""
        return self.compare(reference, actual, inputs, context)


def _label(text: Text) -> str:
    return text[0] if text[1] is None else f"{text[0]} | {text[1]}"


Head = Callable[[Any, Any], Any]
"""Maps a model's output and the mask ``[batch, seq]``, torch tensors, to what the graph returns."""
