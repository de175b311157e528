# SPDX-License-Identifier: Apache-2.0
"""Causal language models with adapters: prompts to token ids, the reference, and the decode loop over any session.

The model without an adapter is called ``base``: the graph is the same, and its adapter tensors are those of a fresh
adapter, which PEFT makes without effect. Frameworks are imported inside the functions that need them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, PositiveInt

from qeff_validate.comparison.logit_metrics import systematic_logit_metrics
from qeff_validate.comparison.vector_metrics import systematic_size
from qeff_validate.comparison.verdict import Verdict
from qeff_validate.config.case import Case, Precision
from qeff_validate.errors import ConfigError, IncomparableError
from qeff_validate.files import expand_user
from qeff_validate.json_tensor import json_tensor, parse_json_tensor
from qeff_validate.models.adapters.files import CONFIG, WEIGHTS, check_size, content, read_config
from qeff_validate.models.causal_lm.adapter_schedule import run_batched, run_sequentially, stack_adapters
from qeff_validate.models.causal_lm.decode_loop import Plan
from qeff_validate.models.causal_lm.options import BASE, PeftCausalLMOptions
from qeff_validate.models.causal_lm.prompts import LONG, TEXTS
from qeff_validate.models.row_order import refuse_frequencies_by_length
from qeff_validate.models.sources.checkpoint import checked, digests
from qeff_validate.models.sources.embedding_tables import module_tables
from qeff_validate.models.sources.resolve import InMemory, Source, resolve
from qeff_validate.models.sources.tokenizers import tokenizer_length
from qeff_validate.models.token_rows import RowsText, TokenRows, split_ids
from qeff_validate.protocols import Change, ComparisonContext, Graph, Session
from qeff_validate.tensors import RETAINED, Array, Tensors, TensorSpec

FP16_MOST, FP16_LEAST = 65504.0, 2.0**-25
"""Greatest finite half, and half of the smallest: what rounds to infinity, and to zero."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is continued, and with which adapters.

    Attributes:
        ids: token ids of each prompt.
        texts: for messages.
        pad: the id of the padding token.
        eos: ids that end a text.
        adapters: tensors of ``base`` and of each adapter, by PEFT's saved names; empty tensors if there is none.
        notes: what a reader of the report should know.
        tables: how many ``tokens`` and ``positions`` the model knows, where that is known.
    """

    ids: tuple[Array, ...]
    texts: tuple[str, ...]
    pad: int
    eos: frozenset[int]
    adapters: Mapping[str, Tensors]
    notes: tuple[str, ...] = ()
    tables: Mapping[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> Sequence[str]:
        """The prompts."""
        return self.texts

    @property
    def tokenless(self) -> frozenset[int]:
        """None: a prompt has a token."""
        return frozenset()


class PeftCausalLM:
    """The model kind ``peft-causal-lm`` (graph interface: design §3).

    Args:
        case: the case.
        options: validated options.
        given: an in-memory causal LM, or a `peft.PeftModel`, instead of the source; it is left unchanged.
        tokenizer: the tokenizer of ``given``.
    """

    def __init__(self, case: Case, options: PeftCausalLMOptions, *, given: Any = None, tokenizer: Any = None) -> None:
        self.case, self.options = case, options
        self._in_memory = None if given is None else InMemory(given, tokenizer)
        self._graph: Graph | None = None
        self._loaded: Any = None

    @cached_property
    def source(self) -> Source:
        """Where weights and tokenizer come from."""
        return self._in_memory or resolve(self.case)

    @property
    def graph(self) -> Graph:
        """The interface of the exported graph; the model is adapted for it if inputs have not been read before."""
        if self._graph is None:
            self._loaded = self._attach_adapters().base_model()
        assert self._graph is not None
        return self._graph

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the graph depends on: not the adapters' weights, which are inputs, but what they are made by."""
        return {**self.settings(), "body": self.source.body_key()}

    def settings(self) -> Mapping[str, Any]:
        """Return what the graph depends on beside the body."""
        adapters = self._adapter_keys(weights=False)
        return {"kind": "peft-causal-lm", "mixed": self.options.mixed_batch, "adapters": adapters}

    def inputs_key(self) -> Mapping[str, Any]:
        """Return what prompts and adapter tensors depend on."""
        options = self.options.model_dump(mode="json", exclude={"batch_size", "padding_side"})
        keys = {"model": self.fingerprint(), "adapters": self._adapter_keys(weights=True)}
        return {**self.asked(), "tokenizer": self.source.tokenizer_key(), "options": options, **keys}

    def asked(self) -> Mapping[str, Any]:
        """Return what is to be tokenized, and how long it may be."""
        sizes = ("prefill_seq_len", "ctx_len", "max_new_tokens")
        return {"texts": self._texts(), **{name: getattr(self.options, name) for name in sizes}}

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what the tokenizer is."""
        return self.source.tokenizer_key()

    def reach(self, inputs: Prompts) -> int:
        """Return how many positions the graph must have; the context may have more slots."""
        return max(tokens.size for tokens in inputs.ids) + self.options.max_new_tokens - 1

    def published(self) -> Mapping[str, Any]:
        """Return the ``model_max_length`` of the tokenizer, and the ``bases`` that saved adapters name, if any."""
        saved = {name: made for name, made in self.options.named().items() if isinstance(made, str)}
        bases = {name: read_config(expand_user(made)).get("base_model_name_or_path") for name, made in saved.items()}
        return {**tokenizer_length(getattr(self.source, "path", None)), "bases": bases}

    def _adapter_keys(self, *, weights: bool) -> Mapping[str, Any]:
        """Return what each adapter is made from; without weights, only what shapes the graph."""
        keys: dict[str, Any] = {}
        for name, made in self.options.named().items():
            if isinstance(made, str):
                folder = expand_user(made)
                files = [folder / file for file in (WEIGHTS, CONFIG) if os.path.lexists(folder / file)]
                if weights and folder / WEIGHTS in files:
                    check_size(folder / WEIGHTS)
                keys[name] = digests(checked(files), folder) if weights else {"saved": content(read_config(folder))}
            else:
                keys[name] = {k: v for k, v in made.items() if weights or k not in ("seed", "init")}
        return keys

    def _texts(self) -> list[str] | None:
        return self.options.prompts if self.options.prompts is not None else self.case.inputs.texts

    def tokenize(self) -> Tensors:
        """Turn prompts into token ids, and adapters into tensors.

        Raises:
            ConfigError: a prompt and its continuation are longer than the context, or an adapter does not fit.
        """
        rows = self.rows()
        adapted = self._attach_adapters()
        tables = module_tables(adapted.model)
        self._loaded = adapted.base_model()
        notes = [note for name, tensors in adapted.adapters.items() for note in _fp16_notes(name, tensors)]
        about = {"texts": rows.texts, "notes": notes, "pad": rows.pad, "eos": sorted(adapted.eos), "tables": tables}
        about |= {"interface": adapted.interface(), "adapters": list(adapted.adapters)}
        weights = {
            f"inputs.{name}/{key}": array
            for name, tensors in adapted.adapters.items()
            for key, array in tensors.items()
        }
        return {
            "ids": np.concatenate(rows.ids),
            "lengths": np.array([tokens.size for tokens in rows.ids], dtype=np.int64),
            "texts": json_tensor(about),
            **weights,
        }

    def rows(self) -> TokenRows:
        """Return the prompts as the tokenizer makes them now.

        Raises:
            ConfigError: a prompt and its continuation are longer than the context.
        """
        tokenize, pad = self.source.tokenizer()
        given = self._texts()
        texts = [*(TEXTS if given is None else given)]
        ids: list[Array] = [np.array(tokenize(text), dtype=np.int64) for text in texts]
        if given is None:
            boundary = list(self._boundary(np.array(tokenize(LONG), dtype=np.int64)))
            texts += [text for text, _ in boundary]
            ids += [tokens for _, tokens in boundary]
        room = self.options.ctx_len - self.options.max_new_tokens
        for text, tokens in zip(texts, ids, strict=True):
            if not 1 <= tokens.size <= room:
                raise ConfigError(
                    f"case {self.case.name!r}: prompt {text[:60]!r} has {tokens.size} tokens, and 1 to {room}"
                    f" fit beside max_new_tokens {self.options.max_new_tokens} in ctx_len {self.options.ctx_len}:"
                    " shorten it, or raise ctx_len"
                )
        return TokenRows(tuple(ids), pad, tuple(texts))

    def _boundary(self, long: Array) -> Iterator[tuple[str, Array]]:
        """Yield prompts that end just before, on and behind the border of a chunk, as far as they fit.

        Each begins elsewhere in the text: what leaks from one that begins alike would not be seen.
        """
        chunk, room = self.options.prefill_seq_len, self.options.ctx_len - self.options.max_new_tokens
        for start, length in enumerate(sorted({1, chunk - 1, chunk, chunk + 1, room})):
            if 1 <= length <= min(room, long.size):
                yield f"({length} tokens of a long text, from {5 * start})", np.roll(long, -5 * start)[:length]

    def inputs(self, stored: Tensors) -> Prompts:
        """Return prompts and adapters from their stored form.

        Raises:
            IncomparableError: a tensor is missing, of another dtype, or does not fit the others.
        """
        about = parse_json_tensor(stored, "texts", PromptsText)
        ids = split_ids(stored, len(about.texts), least=1)
        adapters = _stored_adapters(stored, about.adapters)
        self._graph = _graph(about.interface.model_dump(), self._served_tensors(adapters), self.options)
        texts, notes = tuple(about.texts), tuple(about.notes)
        return Prompts(ids, texts, about.pad, frozenset(about.eos), adapters, notes, about.tables)

    def check_recorded(self, reference: Tensors, inputs: Prompts) -> None:
        """Refuse recorded outputs that do not fit the prompts.

        Raises:
            IncomparableError: a tensor is missing, of another dtype, or does not fit the others.
        """
        from qeff_validate.models.causal_lm.verdict import check_continuations

        vocabulary = self.graph.outputs[0].shape[-1]
        check_continuations(reference, len(inputs.ids) * len(inputs.adapters), self.options.max_new_tokens, vocabulary)

    def _take_model(self) -> Any:
        """Return the model without adapters. Loading takes long, so who has used it puts it back into `_loaded`."""
        model, self._loaded = self._loaded or self.source.causal_lm(), None
        return model

    def _attach_adapters(self) -> Any:
        """Put a fresh adapter on the model, and settle the graph."""
        from qeff_validate.models.causal_lm.attach_adapters import attach

        adapted = attach(self._take_model(), self.options.named())
        self._graph = _graph(adapted.interface(), self._served_tensors(adapted.adapters), self.options)
        return adapted

    def _served_tensors(self, adapters: Mapping[str, Tensors], name: str = BASE) -> Tensors:
        """Return what the graph is fed for an adapter: its own tensors, or those of all."""
        return stack_adapters(adapters) if self.options.mixed_batch else adapters[name]

    def module(self) -> tuple[Any, Tensors]:
        """Load the model, put a fresh adapter on it and wrap it."""
        from qeff_validate.models.causal_lm.wrapper import Decoder, decoder_examples

        adapted = self._attach_adapters()
        module = Decoder(
            adapted.model, len(adapted.dims), adapted.parameter_names, mixed=self.options.mixed_batch
        ).eval()
        return module, decoder_examples(self.graph, self._served_tensors(adapted.adapters))

    def reference(self, inputs: Prompts, *, dtype: str) -> Tensors:
        """Continue each prompt greedily with the original model, by itself, with each adapter as PEFT applies it.

        Returns:
            ``logits`` ``[n, vocab]`` from one forward pass over each whole text without our cache, in ``dtype``;
            ``tokens`` int64 ``[n]``, those that float32 chose; ``steps`` int64, how many each text has.

        Raises:
            UnstableReferenceError: what the model gives for a text depends on the texts before it.
        """
        from qeff_validate.models.causal_lm.reference import continuations

        sizes = [tokens.size for tokens in inputs.ids]
        refuse_frequencies_by_length(inputs.tables, [*sizes, self.reach(inputs)])
        model = self._take_model()
        found = continuations(model, self.options.named(), inputs, self.options.max_new_tokens, dtype)
        self._loaded = model
        return found

    def ensemble(self, inputs: Prompts, reference: Tensors, precision: Precision) -> Iterator[Tensors]:
        """Yield the logits of the reference's texts by the original model in the precision, in each of the ways."""
        from qeff_validate.models.causal_lm.reference import ensemble

        texts = _split(reference["tokens"], reference["steps"])
        model = self._take_model()
        yield from ensemble(model, self.options.named(), inputs, texts, precision)
        self._loaded = model

    def altered(
        self, inputs: Prompts, reference: Tensors, changes: Iterable[Change], dtype: str = "float32"
    ) -> Iterator[tuple[str, Tensors]]:
        """Yield the logits of the reference's texts by the original model with each of some faults."""
        from qeff_validate.models.causal_lm.faulty_reference import FaultyReference

        of: dict[str, list[Change]] = {"body": [], "adapters": [], "session": []}
        for change in changes:
            of[change.level].append(change)
        model, texts = self._take_model(), _split(reference["tokens"], reference["steps"])
        altered = FaultyReference(model, self.options.named(), inputs, texts, dtype)
        yield from altered.bodies(of["body"])
        yield from altered.adapters(of["adapters"], reference["logits"])
        yield from altered.logits(of["session"], reference["logits"])
        self._loaded = model

    def infer(self, session: Session, inputs: Prompts, reference: Tensors) -> Tensors:
        """Run every prompt with every adapter along the reference's tokens, so that each row has its context.

        Returns:
            ``logits``, and ``again``: what the second visits to the first two adapters gave, where state that was left
            from others must not be seen.
        """
        run = run_batched if self.options.mixed_batch else run_sequentially
        return run(session, inputs, self._plan(inputs), _split(reference["tokens"], reference["steps"]))

    def _plan(self, inputs: Prompts) -> Plan:
        options = self.options
        sizes = (options.batch_size, options.prefill_seq_len, options.padding_side)
        return Plan(*sizes, inputs.pad, inputs.eos, options.max_new_tokens)

    def measure(self, exact: Tensors, outputs: Tensors, inputs: Prompts) -> Mapping[str, float]:
        """Return the errors of logits, and of what each adapter changes."""
        from qeff_validate.models.causal_lm.verdict import measure_continuations

        return measure_continuations(exact, outputs["logits"], exact["steps"], list(inputs.adapters), inputs.labels)

    def systematic_errors(
        self,
        center: Tensors,
        outputs: Tensors,
        inputs: Prompts,  # noqa: ARG002
    ) -> Mapping[str, float]:
        """Return the systematic parts of logits' errors."""
        metrics = systematic_logit_metrics(center["logits"], outputs["logits"])
        return {metric.name: systematic_size(metric) for metric in metrics}

    def sensitivity(self, inputs: Prompts, reference: Tensors) -> Sequence[float]:
        """Return the greatest spread of a prompt's logits: what is rounded in them is relative to their size."""
        parts = _split(reference["logits"], reference["steps"])
        spreads = np.array([float(np.max(logits.astype(np.float64).std(axis=1))) for logits in parts])
        return list(spreads.reshape(-1, len(inputs.ids)).max(axis=0))

    def subset(
        self, inputs: Prompts, reference: Tensors, texts: Sequence[int]
    ) -> tuple[Prompts, Tensors, NDArray[np.int64]]:
        """Return prompts, their continuations with each adapter, and the numbers of the rows of logits."""
        size, ends = len(inputs.ids), np.cumsum(reference["steps"])
        places = [size * adapter + text for adapter in range(len(inputs.adapters)) for text in texts]
        rows = np.concatenate([np.arange(ends[at] - reference["steps"][at], ends[at]) for at in places])
        chosen = {name: array[places if name == "steps" else rows] for name, array in reference.items()}
        ids, labels = tuple(inputs.ids[text] for text in texts), tuple(inputs.texts[text] for text in texts)
        return replace(inputs, ids=ids, texts=labels), chosen, rows.astype(np.int64)

    def judge(self, reference: Tensors, actual: Tensors, inputs: Prompts, context: ComparisonContext) -> Verdict:
        """Compare logits, choices, adapters' effects and second visits."""
        from qeff_validate.models.causal_lm.verdict import judge_continuations

        return judge_continuations(reference, actual, context, adapters=list(inputs.adapters), inputs=inputs)

    def relate(self, name: str, session: Session, inputs: Prompts, context: ComparisonContext) -> Verdict:
        """Judge one of `lm_relations.RELATIONS`."""
        from qeff_validate.models.causal_lm.relations import Original, relate

        original = Original(
            merged=lambda adapter, forced: self._original("merged", inputs, adapter, forced),
            kept=lambda adapter: self._original("kept", inputs, adapter),
        )
        return relate(name, session, inputs, self._plan(inputs), context, original)

    def _original(self, what: str, inputs: Prompts, adapter: str, *given: Any) -> Any:
        """Load the model anew, and ask for what a function of `lm_reference` gives."""
        if self.case.artifacts.reference is not None:
            raise IncomparableError("the reference is recorded, so there need be no original model here")
        named = self.options.named()
        if adapter != BASE and adapter not in named:
            raise IncomparableError(
                "the adapters of a model in memory are not put on another one: it is left unchanged"
            )
        from qeff_validate.models.causal_lm import reference as lm_reference

        made = named.get(adapter)
        return getattr(lm_reference, what)(self.source.causal_lm(), made, inputs.adapters[adapter], inputs.ids, *given)


class Interface(BaseModel):
    """Heads and size of each layer's keys and values, and the size of the vocabulary."""

    dims: list[tuple[tuple[PositiveInt, PositiveInt], tuple[PositiveInt, PositiveInt]]]
    vocab: PositiveInt


class PromptsText(RowsText):
    """What the tensor ``texts`` holds beside the token ids."""

    eos: list[int]
    interface: Interface
    adapters: list[str]


def _stored_adapters(stored: Tensors, names: Sequence[str]) -> dict[str, dict[str, Array]]:
    """Return the tensors of each adapter; all have the same names, dtypes and shapes, for they share a graph."""
    adapters: dict[str, dict[str, Array]] = {name: {} for name in names}
    if BASE not in adapters:
        raise IncomparableError(f"tensor 'texts': adapters are {list(names)}, and {BASE!r} is not among them")
    for key, array in stored.items():
        if key.startswith("inputs."):
            name, _, tensor = key.removeprefix("inputs.").rpartition("/")
            if name not in adapters:
                raise IncomparableError(f"tensor {key!r} belongs to no adapter in {list(names)}")
            adapters[name][tensor] = array
    wanted = {key: (array.dtype, array.shape) for key, array in adapters[BASE].items()}
    for name, tensors in adapters.items():
        if {key: (array.dtype, array.shape) for key, array in tensors.items()} != wanted:
            raise IncomparableError(f"the tensors 'inputs.{name}/…' have other names, dtypes or shapes than the base's")
        for key, array in tensors.items():
            if array.dtype.kind != "f":
                raise IncomparableError(f"tensor 'inputs.{name}/{key}' is {array.dtype}, and weights are real numbers")
    return adapters


def _split(values: Array, steps: Array) -> list[Array]:
    return np.split(values, np.cumsum(steps)[:-1])


def _graph(interface: Mapping[str, Any], adapter: Tensors, options: PeftCausalLMOptions) -> Graph:
    tokens = [TensorSpec(name, "int64", ("batch_size", "seq_len")) for name in ("input_ids", "position_ids")]
    state = [
        TensorSpec(f"past_{name}.{layer}", "float32", ("batch_size", heads, "ctx_len", size))
        for layer, pair in enumerate(interface["dims"])
        for name, (heads, size) in zip(("key", "value"), pair, strict=True)
    ]
    if options.mixed_batch:
        tokens.append(TensorSpec("adapter_ids", "int64", ("batch_size",)))
    weights = [TensorSpec(name, array.dtype.name, array.shape) for name, array in adapter.items()]
    twins = [TensorSpec(f"{spec.name}{RETAINED}", spec.dtype, spec.shape) for spec in (*state, *weights)]
    sizes = {"batch_size": options.batch_size, "ctx_len": options.ctx_len}
    lengths = dict.fromkeys((options.prefill_seq_len, 1))
    return Graph(
        inputs=(*tokens, *state, *weights),
        outputs=(TensorSpec("logits", "float32", ("batch_size", 1, interface["vocab"])), *twins),
        buckets=tuple({"seq_len": length, **sizes} for length in lengths),
    )


def _fp16_notes(name: str, tensors: Tensors) -> Iterator[str]:
    """Say what of an adapter does not survive half precision."""
    over = [key for key, array in tensors.items() if (np.abs(array) > FP16_MOST).any()]
    under = sum(int(((np.abs(array) < FP16_LEAST) & (array != 0)).sum()) for array in tensors.values())
    if over:
        yield f"adapter {name}: {len(over)} tensors have values beyond fp16 (65504), first {over[0]}"
    if under:
        yield f"adapter {name}: {under} values are so small that fp16 makes them zero"
