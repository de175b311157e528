# SPDX-License-Identifier: Apache-2.0
"""Causal language models with adapters: prompts to token ids, the reference, and the decode loop over any session.

The model without an adapter is called ``base``: it uses the same graph, with the tensors of an adapter without
effect. Frameworks are imported inside the functions that need them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
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
from qeff_validate.models.adapters.files import (
    CONFIG,
    INDEX,
    content,
    holds_base_weights,
    read_config,
    tensor_shapes,
    vocabulary,
    weight_files,
)
from qeff_validate.models.causal_lm.adapter_schedule import run_batched, run_sequentially, stack_adapters
from qeff_validate.models.causal_lm.decode_loop import NEVER, Plan, invocation_start, sampling_notes
from qeff_validate.models.causal_lm.options import BASE, PeftCausalLMOptions
from qeff_validate.models.causal_lm.prompts import LONG, TEXTS
from qeff_validate.models.causal_lm.virtual_tokens import VirtualTokens
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.models.row_order import refuse_frequencies_by_length
from qeff_validate.models.sources.checkpoint import checked, digests, has_tokenizer, tokenizer_files
from qeff_validate.models.sources.embedding_tables import module_tables
from qeff_validate.models.sources.resolve import InMemory, Source, resolve
from qeff_validate.models.sources.tokenizers import (
    Tokenize,
    conversation_ids,
    load_tokenizer,
    tokenize_with,
    tokenizer_length,
)
from qeff_validate.models.token_rows import RowsText, TokenRows, split_ids
from qeff_validate.protocols import (
    Change,
    ComparisonContext,
    Explained,
    FaultTested,
    Graph,
    OriginalRun,
    Prechecked,
    RecordingChecked,
    Session,
    Timed,
    Workload,
)
from qeff_validate.tensors import RETAINED, Array, Tensors, TensorSpec

FP16_MOST, FP16_LEAST = 65504.0, 2.0**-25
"""The greatest finite fp16 number, and half of the smallest: beyond them values round to infinity and to zero."""


class Interface(BaseModel):
    """Sizes of a model that shape its graph.

    Attributes:
        dims: number of heads and head size of each layer's keys and values; None for a layer without.
        vocab: vocabulary size.
        recurrent: shapes of recurrent states without their batch dim, by the name of the input.
    """

    dims: list[tuple[tuple[PositiveInt, PositiveInt], tuple[PositiveInt, PositiveInt]] | None]
    vocab: PositiveInt
    recurrent: dict[str, tuple[PositiveInt, ...]] = {}


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts and adapters.

    Attributes:
        ids: token ids of each prompt, int64 ``[n]``.
        texts: the prompts, for messages.
        pad: id of the padding token.
        eos: token ids that end a text.
        adapters: tensors of ``base`` and of each adapter, by PEFT's saved name; no tensors if the case has no adapters.
        interface: sizes of the model that shape the graph.
        shared: PEFT options of the layers that serve adapters of different shape; None: all have the same options.
        virtual: virtual tokens of the adapters; None: they have none.
        invocation: tokens from which on the adapters act (activated LoRA); empty: they always do.
        notes: notes for the report.
        tables: sizes of the model's tables of ``tokens`` and ``positions``, as far as known.
    """

    ids: tuple[Array, ...]
    texts: tuple[str, ...]
    pad: int
    eos: frozenset[int]
    adapters: Mapping[str, Tensors]
    interface: Interface
    notes: tuple[str, ...] = ()
    tables: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, Any] | None = None
    virtual: VirtualTokens | None = None
    invocation: tuple[int, ...] = ()

    def fed(self, adapter: str) -> tuple[Array, ...]:
        """Return the token ids that the graph is fed for each prompt with an adapter, its virtual tokens included."""
        return self.ids if self.virtual is None else self.virtual.fed(adapter, self.ids)

    @property
    def attended_ids(self) -> tuple[Array, ...]:
        """Token ids of each prompt, as they are fed with any adapter."""
        if self.virtual is None:
            return self.ids
        return tuple(tokens for name in self.adapters for tokens in self.fed(name))

    @property
    def labels(self) -> Sequence[str]:
        """The prompts."""
        return self.texts

    @property
    def tokenless(self) -> frozenset[int]:
        """Empty: every prompt has a token."""
        return frozenset()


class PeftCausalLM(FaultTested, Prechecked, RecordingChecked, Timed, Explained):
    """The model kind ``peft-causal-lm`` (graph interface: design §3).

    Args:
        case: the case.
        options: validated options.
        given: an in-memory causal LM, or a `peft.PeftModel`, instead of the source; left unchanged.
        tokenizer: the tokenizer of ``given``.
    """

    def __init__(self, case: Case, options: PeftCausalLMOptions, *, given: Any = None, tokenizer: Any = None) -> None:
        self.case, self.options = case, options
        self._in_memory = None if given is None else InMemory(given, tokenizer)
        self._loaded: Any = None
        self._tokens: int | None = None  # of the base, before its vocabulary grew to that of its adapters

    @cached_property
    def source(self) -> Source:
        """The source of weights and tokenizer."""
        return self._in_memory or resolve(self.case)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the graph depends on; adapter weights are inputs, so only the adapters' options are included."""
        return {**self.settings(), "body": self.source.body_key()}

    def settings(self) -> Mapping[str, Any]:
        """Return what the graph depends on besides the body."""
        adapters = self._adapter_keys(weights=False)
        return {"kind": "peft-causal-lm", "mixed": self.options.mixed_batch, "adapters": adapters}

    def inputs_key(self) -> Mapping[str, Any]:
        """Return what prompts and adapter tensors depend on."""
        options = self.options.model_dump(mode="json", exclude={"batch_size", "padding_side"})
        keys = {"model": self.fingerprint(), "adapters": self._adapter_keys(weights=True)}
        return {**self.asked(), "tokenizer": self.tokenizer_key(), "options": options, **keys}

    def asked(self) -> Mapping[str, Any]:
        """Return the texts and the length limits that are tokenized."""
        sizes = ("prefill_seq_len", "ctx_len", "max_new_tokens")
        conversations = {"messages": self._messages()} if self.options.messages is not None else {}
        return {"texts": self._texts(), **conversations, **{name: getattr(self.options, name) for name in sizes}}

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what identifies the tokenizer, those in the directories of adapters included."""
        own = {name: digests(tokenizer_files(folder), folder) for name, folder in self._own_tokenizers().items()}
        return {**self.source.tokenizer_key(), **({"adapters": own} if own else {})}

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The directories of saved adapters, by the adapter's name."""
        return {name: expand_user(spec) for name, spec in self.options.named().items() if isinstance(spec, str)}

    def _adapter_configs(self) -> list[Mapping[str, Any]]:
        """Return the config of each adapter, as its directory or the case has it."""
        named = self.options.named().items()
        return [read_config(self._folders[name]) if isinstance(spec, str) else spec for name, spec in named]

    def _own_tokenizers(self) -> dict[str, Path]:
        """Return the directories of adapters that hold a tokenizer, by the adapter's name."""
        return {name: folder for name, folder in self._folders.items() if has_tokenizer(folder)}

    def _messages(self) -> list[list[dict[str, str]]]:
        return [[message.model_dump() for message in messages] for messages in self.options.messages or ()]

    def _tokenizer(self) -> tuple[Tokenize, int, str]:
        """Return the tokenizer, the padding id, and a note if the tokenizer is that of an adapter with more tokens.

        Raises:
            ConfigError: several adapters have added different tokens.
        """
        tokenizer, note = self._grown
        return *(self.source.tokenizer() if tokenizer is None else tokenize_with(tokenizer)), note

    def _once_begun(self, rows: Iterable[list[int]]) -> Iterator[list[int]]:
        """Yield token ids with one begin token, where a text holds it and the tokenizer has added another."""
        for ids in rows:
            repeated = len(ids) > 1 and ids[0] == ids[1]
            doubled = repeated and ids[0] == getattr(self._pretrained_tokenizer, "bos_token_id", None)
            yield ids[1:] if doubled else ids

    def _conversations(self) -> Iterator[tuple[str, Array]]:
        """Yield text and token ids of each conversation.

        Raises:
            ConfigError: neither the model's tokenizer nor those of its adapters have a chat template, or it refuses.
        """
        tokenizer = self._pretrained_tokenizer
        if not getattr(tokenizer, "chat_template", None):
            own = (load_tokenizer(folder) for folder in self._own_tokenizers().values())
            tokenizer = next((other for other in own if other.chat_template), tokenizer)
        for messages in self._messages():
            ids, text = conversation_ids(tokenizer, messages, add_generation_prompt=self.options.add_generation_prompt)
            yield text, np.array(ids, dtype=np.int64)

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        """The transformers tokenizer of the prompts: that of an adapter with more tokens, else the model's or None."""
        return self._grown[0] or self.source.pretrained_tokenizer()

    @cached_property
    def _grown(self) -> tuple[Any, str]:
        """The transformers tokenizer of an adapter with more tokens than the model's, and a note; or None.

        Raises:
            ConfigError: several adapters have added different tokens.
        """
        own = {name: load_tokenizer(folder) for name, folder in self._own_tokenizers().items()}
        published = self.source.pretrained_tokenizer() if own else None
        size = 0 if published is None else len(published)
        grown = {name: tokenizer for name, tokenizer in own.items() if len(tokenizer) > size}
        if not grown:
            return None, ""
        first, *others = grown
        for name in others:
            if grown[name].get_vocab() != grown[first].get_vocab():
                raise ConfigError(
                    f"case {self.case.name!r}: the adapters {first!r} and {name!r} have added different tokens to the"
                    " tokenizer, so a prompt has no ids that both understand: give each a case"
                )
        note = f"prompts are tokenized with the tokenizer of adapter {first!r}: {len(grown[first])} tokens"
        return grown[first], f"{note}, the base's has {size}" if size else note

    def reach(self, inputs: Prompts) -> int:
        """Return the number of positions that the graph needs; the context may have more slots."""
        longest = max(tokens.size for tokens in inputs.attended_ids)
        return longest + self.options.max_new_tokens - 1

    def published(self) -> Mapping[str, Any]:
        """Return the ``model_max_length`` of the tokenizer, and the ``bases`` that saved adapters name, if any."""
        bases = {name: read_config(folder).get("base_model_name_or_path") for name, folder in self._folders.items()}
        return {**tokenizer_length(getattr(self.source, "path", None)), "bases": bases}

    def _adapter_keys(self, *, weights: bool) -> Mapping[str, Any]:
        """Return what identifies each adapter; without weights, only what determines the graph."""
        keys: dict[str, Any] = {}
        for name, spec in self.options.named().items():
            if isinstance(spec, str):
                folder = self._folders[name]
                config, shapes = content(read_config(folder)), tensor_shapes(folder)
                whole = weights or holds_base_weights(shapes)  # weights that are equal to the base's are no inputs
                files = [folder / file for file in (CONFIG, INDEX) if os.path.lexists(folder / file)]
                keys[name] = digests(checked([*weight_files(folder), *files]), folder) if whole else {"saved": config}
            else:
                keys[name] = {k: v for k, v in spec.items() if weights or k not in ("seed", "init")}
        return keys

    def _texts(self) -> list[str] | None:
        for name in self.case.inputs.given():
            if name != "texts":
                raise ConfigError(
                    f"case {self.case.name!r}: inputs: {name}: the model kind {self.case.model!r} reads prompts: give"
                    " texts, or options: {prompts: […]}"
                )
        return self.options.prompts if self.options.prompts is not None else self.case.inputs.texts

    def tokenize(self) -> Tensors:
        """Tokenize the prompts, and read or create the adapter tensors.

        Raises:
            ConfigError: a prompt and its continuation are longer than the context, or an adapter does not fit.
        """
        rows = self.rows()
        adapted = self._attach_adapters()
        tables = module_tables(adapted.model)
        self._loaded = adapted.base_model()
        _, own_tokenizer = self._grown
        notes = [own_tokenizer] if own_tokenizer else []
        notes += [note for name, tensors in adapted.adapters.items() for note in _fp16_notes(name, tensors)]
        about = {"texts": rows.texts, "notes": notes, "pad": rows.pad, "eos": sorted(adapted.eos), "tables": tables}
        notes += sampling_notes(adapted.model)
        about |= {"interface": adapted.interface(), "adapters": list(adapted.adapters), "shared": adapted.shared}
        about["virtual"] = None if adapted.virtual is None else adapted.virtual.model_dump()
        about["invocation"] = adapted.invocation
        without = sum(invocation_start(tokens, adapted.invocation) == NEVER for tokens in rows.ids)
        if adapted.invocation and without:
            notes.append(f"{without} of {len(rows.ids)} prompts do not hold the invocation tokens of the adapters")
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
        """Tokenize the prompts without using stored inputs.

        Raises:
            ConfigError: a prompt and its continuation are longer than the context.
        """
        tokenize, pad, _ = self._tokenizer()
        user_texts = self._texts()
        if self.options.messages is not None:
            conversations = list(self._conversations())
            texts = [text for text, _ in conversations]
            ids = [tokens for _, tokens in conversations]
        else:
            texts = [*(TEXTS if user_texts is None else user_texts)]
            ids = [np.array(tokens, dtype=np.int64) for tokens in self._once_begun(map(tokenize, texts))]
        if user_texts is None and self.options.messages is None:
            boundary = list(self._boundary(np.array(tokenize(LONG), dtype=np.int64)))
            texts += [text for text, _ in boundary]
            ids += [tokens for _, tokens in boundary]
            ids = [_with_invocation(tokens, self._invocation()) for tokens in ids]
        room = self._room()
        hidden = self.options.ctx_len - self.options.max_new_tokens - room
        virtual = f" and {hidden} virtual tokens" if hidden else ""
        for text, tokens in zip(texts, ids, strict=True):
            if not 1 <= tokens.size <= room:
                raise ConfigError(
                    f"case {self.case.name!r}: prompt {text[:60]!r} has {tokens.size} tokens, and 1 to {room}"
                    f" fit beside max_new_tokens {self.options.max_new_tokens}{virtual} in ctx_len"
                    f" {self.options.ctx_len}:"
                    " shorten it, or raise ctx_len"
                )
        return TokenRows(tuple(ids), pad, tuple(texts))

    def _room(self) -> int:
        """Return the number of tokens that a prompt may have, beside virtual tokens and the continuation."""
        counts = [config.get("num_virtual_tokens") for config in self._adapter_configs()]
        virtual = max((count for count in counts if isinstance(count, int)), default=0)
        return self.options.ctx_len - self.options.max_new_tokens - max(virtual, 0)

    def _invocation(self) -> list[int]:
        """Return the invocation tokens of activated LoRA; empty without."""
        configs = self._adapter_configs()
        return next((config["alora_invocation_tokens"] for config in configs if _is_activated(config)), [])

    def _boundary(self, long: Array) -> Iterator[tuple[str, Array]]:
        """Yield prompts that end just before, at and after a chunk boundary, if they fit.

        Each starts at another offset of the text, because a leak from a prompt with the same prefix would not be seen.
        """
        chunk, room = self.options.prefill_seq_len, self._room()
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
        texts, notes = tuple(about.texts), tuple(about.notes)
        eos, interface = frozenset(about.eos), about.interface
        return Prompts(
            ids, texts, about.pad, eos, adapters, interface, notes, about.tables, about.shared, about.virtual,
            about.invocation,
        )  # fmt: skip

    def interface(self, inputs: Prompts) -> Graph:
        """Return the interface of the graph that serves the adapters of the inputs."""
        return self._graph(inputs.interface, inputs.adapters, starts=bool(inputs.invocation))

    def _graph(self, interface: Interface, adapters: Mapping[str, Tensors], *, starts: bool) -> Graph:
        return _graph(interface, self._served_tensors(adapters), self.options, starts=starts)

    def check_recorded(self, reference: Tensors, inputs: Prompts) -> None:
        """Refuse recorded outputs that do not fit the prompts.

        Raises:
            IncomparableError: a tensor is missing, of another dtype, or does not fit the others.
        """
        from qeff_validate.models.causal_lm.verdict import check_continuations

        texts = len(inputs.ids) * len(inputs.adapters)
        check_continuations(reference, texts, self.options.max_new_tokens, inputs.interface.vocab)

    def _take_model(self) -> Any:
        """Return the model without adapters; the caller puts it back into `_loaded`, because loading is slow."""
        model, self._loaded = self._loaded or self._load_model(), None
        return model

    def _load_model(self) -> Any:
        """Load the model, with embeddings for as many tokens as its adapters have."""
        from qeff_validate.models.adapters.base_state import grow_vocabulary

        rows = {name: size for name, folder in self._folders.items() if (size := vocabulary(tensor_shapes(folder)))}
        if len(set(rows.values())) > 1:
            sizes = ", ".join(f"{name!r} {size}" for name, size in rows.items())
            raise ConfigError(
                f"case {self.case.name!r}: adapters bring embeddings or heads for different numbers of tokens"
                f" ({sizes}), and a graph has one vocabulary: give each number a case"
            )
        model = self.source.causal_lm()
        with translated_errors("give the base the embeddings of its adapters' tokens"):
            self._tokens = grow_vocabulary(model, max(rows.values(), default=0))
        return model

    def _attach_adapters(self) -> Any:
        """Attach an adapter without effect to the model."""
        from qeff_validate.models.causal_lm.attach_adapters import attach

        model = self._take_model()
        return attach(model, self.options.named(), self._tokens)

    def _served_tensors(self, adapters: Mapping[str, Tensors], name: str = BASE) -> Tensors:
        """Return the adapter inputs of the graph: the tensors of one adapter, or the stack of all."""
        return stack_adapters(adapters) if self.options.mixed_batch else adapters[name]

    def _specs(self, inputs: Prompts, *, served: bool = False) -> Mapping[str, str | Mapping[str, Any]]:
        """Return the directory or the PEFT options of each adapter.

        Args:
            inputs: hold tensors of each adapter, for the shared layers if there are any.
            served: those that fit the tensors of ``inputs``, not the user's directories.
        """
        named, shared = self.options.named(), inputs.shared
        if shared is None:
            return named
        return {name: spec if isinstance(spec, str) and not served else shared for name, spec in named.items()}

    def module(self) -> tuple[Any, Tensors]:
        """Load the model, attach an adapter without effect, and wrap it."""
        from qeff_validate.models.causal_lm.wrapper import Decoder, decoder_examples

        adapted = self._attach_adapters()
        mixed, layers = self.options.mixed_batch, len(adapted.states.dims)
        module = Decoder(adapted.model, layers, adapted.parameter_names, mixed=mixed, virtual=adapted.virtual).eval()
        interface = Interface.model_validate(adapted.interface())
        graph = self._graph(interface, adapted.adapters, starts=bool(adapted.invocation))
        return module, decoder_examples(graph, self._served_tensors(adapted.adapters))

    def reference(self, inputs: Prompts, *, dtype: str) -> Tensors:
        """Continue each prompt greedily, alone, with the original model and each adapter, applied by PEFT.

        Returns:
            ``logits`` ``[n, vocab]`` in ``dtype``, from one forward pass over each text without our cache; ``tokens``
            int64 ``[n]``, chosen in float32; ``steps`` int64, the number of tokens of each continuation.

        Raises:
            UnstableReferenceError: the result of a text depends on texts that were run before it.
        """
        from qeff_validate.models.causal_lm.reference import continuations

        sizes = [tokens.size for tokens in inputs.ids]
        refuse_frequencies_by_length(inputs.tables, [*sizes, self.reach(inputs)])
        model = self._take_model()
        outputs = continuations(model, self._specs(inputs), inputs, self.options.max_new_tokens, dtype)
        self._loaded = model
        return outputs

    def ensemble(self, inputs: Prompts, reference: Tensors, precision: Precision) -> Iterator[Tensors]:
        """Yield the original model's logits of the reference's texts, for each variant of `ENSEMBLE`."""
        from qeff_validate.models.causal_lm.reference import ensemble

        texts = _split(reference["tokens"], reference["steps"])
        model = self._take_model()
        yield from ensemble(model, self._specs(inputs), inputs, texts, precision)
        self._loaded = model

    def faulty_runs(
        self, inputs: Prompts, reference: Tensors, changes: Iterable[Change], dtype: str = "float32"
    ) -> Iterator[tuple[str, Tensors]]:
        """Yield the original model's logits of the reference's texts with each fault."""
        from qeff_validate.models.causal_lm.faulty_reference import FaultyReference

        by_level: dict[str, list[Change]] = {"body": [], "adapters": [], "session": []}
        for change in changes:
            by_level[change.level].append(change)
        model, texts = self._take_model(), _split(reference["tokens"], reference["steps"])
        faulty = FaultyReference(model, self._specs(inputs, served=True), inputs, texts, dtype)
        yield from faulty.bodies(by_level["body"])
        yield from faulty.adapters(by_level["adapters"], reference["logits"])
        yield from faulty.logits(by_level["session"], reference["logits"])
        self._loaded = model

    def infer(self, session: Session, inputs: Prompts, reference: Tensors) -> Tensors:
        """Run every prompt with every adapter along the reference's tokens (teacher forcing).

        Returns:
            ``logits``, and ``again``: the logits of second visits to the first two adapters, which must show no state
            left over from others.
        """
        run = run_batched if self.options.mixed_batch else run_sequentially
        return run(session, inputs, self._plan(inputs), _split(reference["tokens"], reference["steps"]))

    def original_run(self, inputs: Prompts, reference: Tensors, sizes: Mapping[str, int], row: int) -> OriginalRun:
        """Return one run of a prompt and its continuation up to a row of the logits, with that row's adapter."""
        from qeff_validate.models.causal_lm.original_run import original_run
        from qeff_validate.models.causal_lm.reference import adapted_models

        if inputs.virtual is not None or inputs.interface.recurrent:
            raise IncomparableError("modules of a model with virtual tokens or recurrent states are not compared")
        ends = np.cumsum(reference["steps"])
        at = int(np.searchsorted(ends, row, side="right"))
        adapter, prompt = divmod(at, len(inputs.ids))
        step = row - int(ends[at] - reference["steps"][at])
        tokens = _split(reference["tokens"], reference["steps"])[at][:step]
        name = list(inputs.adapters)[adapter]
        models = adapted_models(self._take_model(), self._specs(inputs, served=True), inputs.adapters)
        for _, model in zip(list(inputs.adapters)[: adapter + 1], models):  # noqa: B007, B905 (the generator would unload it)
            pass
        text = np.concatenate([inputs.ids[prompt], tokens])
        tensors = self._served_tensors(inputs.adapters, name)
        place = adapter if self.options.mixed_batch else 0
        start = invocation_start(inputs.ids[prompt], inputs.invocation)
        graph = self.interface(inputs)
        return original_run(
            model, graph, text, tensors, sizes, pad=inputs.pad, adapter_id=place, start=start, steps=tokens.size
        )

    def text_of_row(self, inputs: Prompts, reference: Tensors, row: int) -> int:
        """Return the prompt that a row of the logits continues."""
        return int(np.searchsorted(np.cumsum(reference["steps"]), row, side="right")) % len(inputs.ids)

    def workloads(self, session: Session, inputs: Prompts) -> Sequence[Workload]:
        """Return the prefill of the shortest and the longest prompt, a decode step after each, and a swap of adapters.

        Rows are full: no row of a batch is padding. A decode step is repeated at its position, which costs the same.
        """
        from qeff_validate.models.causal_lm.workloads import decoder_workloads

        states = [self._served_tensors(inputs.adapters, name) for name in inputs.adapters]
        return decoder_workloads(session, self._plan(inputs), np.concatenate(inputs.ids), states, self.options.ctx_len)

    def _plan(self, inputs: Prompts) -> Plan:
        options = self.options
        chunk = 1 if inputs.interface.recurrent else options.prefill_seq_len
        sizes = (options.batch_size, chunk, options.padding_side)
        return Plan(*sizes, inputs.pad, inputs.eos, options.max_new_tokens, invocation=inputs.invocation)

    def measure(self, exact: Tensors, outputs: Tensors, inputs: Prompts) -> Mapping[str, float]:
        """Return the errors of logits, and of the change that each adapter makes."""
        from qeff_validate.models.causal_lm.verdict import measure_continuations

        return measure_continuations(exact, outputs["logits"], exact["steps"], list(inputs.adapters), inputs.labels)

    def systematic_errors(
        self,
        center: Tensors,
        outputs: Tensors,
        inputs: Prompts,  # noqa: ARG002
    ) -> Mapping[str, float]:
        """Return the systematic errors of logits."""
        metrics = systematic_logit_metrics(center["logits"], outputs["logits"])
        return {metric.name: systematic_size(metric) for metric in metrics}

    def sensitivity(self, inputs: Prompts, reference: Tensors) -> Sequence[float]:
        """Return the maximum standard deviation of each prompt's logits, which their rounding errors scale with."""
        parts = _split(reference["logits"], reference["steps"])
        spreads = np.array([float(np.max(logits.astype(np.float64).std(axis=1))) for logits in parts])
        return list(spreads.reshape(-1, len(inputs.ids)).max(axis=0))

    def subset(
        self, inputs: Prompts, reference: Tensors, texts: Sequence[int]
    ) -> tuple[Prompts, Tensors, NDArray[np.int64]]:
        """Return some prompts, the reference of their continuations, and the indices of its rows."""
        size, ends = len(inputs.ids), np.cumsum(reference["steps"])
        places = [size * adapter + text for adapter in range(len(inputs.adapters)) for text in texts]
        rows = np.concatenate([np.arange(ends[at] - reference["steps"][at], ends[at]) for at in places])
        chosen = {name: array[places if name == "steps" else rows] for name, array in reference.items()}
        ids, labels = tuple(inputs.ids[text] for text in texts), tuple(inputs.texts[text] for text in texts)
        return replace(inputs, ids=ids, texts=labels), chosen, rows.astype(np.int64)

    def judge(self, reference: Tensors, actual: Tensors, inputs: Prompts, context: ComparisonContext) -> Verdict:
        """Compare logits, chosen tokens, effects of adapters, and second visits."""
        from qeff_validate.models.causal_lm.verdict import judge_continuations

        return judge_continuations(reference, actual, context, adapters=list(inputs.adapters), inputs=inputs)

    def relate(self, name: str, session: Session, inputs: Prompts, context: ComparisonContext) -> Verdict:
        """Check one of `relations.RELATIONS`."""
        from qeff_validate.models.causal_lm.relations import Original, relate

        original = Original(
            merged_logits=lambda adapter, forced: self._run_original("merged_logits", inputs, adapter, forced),
            keys_and_values=lambda adapter: self._run_original("keys_and_values", inputs, adapter),
        )
        return relate(name, session, inputs, self._plan(inputs), context, original)

    def _run_original(self, function: str, inputs: Prompts, adapter: str, *args: Any) -> Any:
        """Load the model again, and call a function of `causal_lm.reference` with it and an adapter."""
        if self.case.artifacts.reference is not None:
            raise IncomparableError("the reference is recorded, so there need be no original model here")
        named = self._specs(inputs, served=True)
        if adapter != BASE and adapter not in named:
            raise IncomparableError(
                "the adapters of a model in memory are not put on another one: it is left unchanged"
            )
        from qeff_validate.models.causal_lm import reference

        run = getattr(reference, function)
        return run(self._load_model(), named.get(adapter), inputs.adapters[adapter], inputs.ids, *args)


class PromptsText(RowsText):
    """Content of the tensor ``texts``."""

    eos: list[int]
    interface: Interface
    adapters: list[str]
    shared: dict[str, Any] | None = None
    virtual: VirtualTokens | None = None
    invocation: tuple[int, ...] = ()


def _is_activated(config: Mapping[str, Any]) -> bool:
    tokens = config.get("alora_invocation_tokens")
    return isinstance(tokens, list) and bool(tokens)


def _with_invocation(tokens: Array, invocation: Sequence[int]) -> Array:
    """Return a built-in prompt with the invocation in its middle, if it is long enough."""
    at = (tokens.size - len(invocation)) // 2
    if at < 1 or not invocation:
        return tokens
    return np.concatenate([tokens[:at], np.array(invocation), tokens[at + len(invocation) :]])


def _stored_adapters(stored: Tensors, names: Sequence[str]) -> dict[str, dict[str, Array]]:
    """Return the tensors of each adapter; names, dtypes and shapes must be equal, because adapters share a graph."""
    adapters: dict[str, dict[str, Array]] = {name: {} for name in names}
    if BASE not in adapters:
        raise IncomparableError(f"tensor 'texts': adapters are {list(names)}, and {BASE!r} is not among them")
    for key, array in sorted(stored.items()):
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


def _graph(interface: Interface, adapter: Tensors, options: PeftCausalLMOptions, *, starts: bool) -> Graph:
    length: str | int = 1 if interface.recurrent else "seq_len"  # transformers continues recurrent states by one token
    tokens = [TensorSpec(name, "int64", ("batch_size", length)) for name in ("input_ids", "position_ids")]
    state = [
        TensorSpec(f"past_{name}.{layer}", "float32", ("batch_size", heads, "ctx_len", size))
        for layer, pair in enumerate(interface.dims)
        if pair is not None
        for name, (heads, size) in zip(("key", "value"), pair, strict=True)
    ]
    slots = {"ctx_len": options.ctx_len} if state else {}
    recurrent: dict[str, tuple[int | str, ...]] = {
        name: ("batch_size", *shape) for name, shape in interface.recurrent.items()
    }
    state += [TensorSpec(name, "float32", shape) for name, shape in recurrent.items()]
    if options.mixed_batch:
        tokens.append(TensorSpec("adapter_ids", "int64", ("batch_size",)))
    if starts:
        tokens.append(TensorSpec("adapter_start", "int64", ("batch_size",)))
    weights = [TensorSpec(name, array.dtype.name, array.shape) for name, array in adapter.items()]
    twins = [TensorSpec(f"{spec.name}{RETAINED}", spec.dtype, spec.shape) for spec in (*state, *weights)]
    sizes = {"batch_size": options.batch_size, **slots}
    lengths = dict.fromkeys((options.prefill_seq_len, 1))
    buckets = tuple({"seq_len": length, **sizes} for length in lengths)
    return Graph(
        inputs=(*tokens, *state, *weights),
        outputs=(TensorSpec("logits", "float32", ("batch_size", 1, interface.vocab)), *twins),
        buckets=(sizes,) if recurrent else buckets,
    )


def _fp16_notes(name: str, tensors: Tensors) -> Iterator[str]:
    """Yield notes on weights that overflow or underflow in fp16."""
    over = [key for key, array in tensors.items() if (np.abs(array) > FP16_MOST).any()]
    under = sum(int(((np.abs(array) < FP16_LEAST) & (array != 0)).sum()) for array in tensors.values())
    if over:
        yield f"adapter {name}: {len(over)} tensors have values beyond fp16 (65504), first {over[0]}"
    if under:
        yield f"adapter {name}: {under} values are so small that fp16 makes them zero"
