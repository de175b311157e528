# SPDX-License-Identifier: Apache-2.0
"""Causal language models with adapters: prompts to token ids, the reference, and the decode loop over any session.

The model without an adapter is called ``base``: it uses the same graph, with the tensors of an adapter without
effect. Frameworks are imported inside the functions that need them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.logit_metrics import systematic_logit_metrics
from qeff_validate.comparison.vector_metrics import systematic_size
from qeff_validate.comparison.verdict import Verdict
from qeff_validate.config.case import Case, Precision
from qeff_validate.errors import IncomparableError, ValidateError
from qeff_validate.json_tensor import json_tensor
from qeff_validate.models.causal_lm.adapter_schedule import run_batched, run_sequentially, stack_adapters
from qeff_validate.models.causal_lm.adapter_specs import AdapterSpecs, fp16_notes
from qeff_validate.models.causal_lm.decoder_feeds import NEVER, Plan, invocation_start
from qeff_validate.models.causal_lm.decoder_interface import Interface, decoder_graph
from qeff_validate.models.causal_lm.next_tokens import NextTokenMonitor
from qeff_validate.models.causal_lm.options import BASE, PeftCausalLMOptions
from qeff_validate.models.causal_lm.prompt_inputs import Prompts, prompts_of, split_steps
from qeff_validate.models.causal_lm.prompt_tokens import PromptTokenizer
from qeff_validate.models.causal_lm.sampling_notes import sampling_notes
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.models.row_order import refuse_frequencies_by_length
from qeff_validate.models.sources.embedding_tables import module_tables
from qeff_validate.models.sources.quantized import quantization_notes
from qeff_validate.models.sources.resolve import InMemory, Source, resolve
from qeff_validate.models.sources.tokenizers import tokenizer_length
from qeff_validate.models.token_rows import TokenRows
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
from qeff_validate.tensors import Tensors


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
        self._adapters = AdapterSpecs(options.named())
        self._tokenizer = PromptTokenizer(case, options, lambda: self.source, self._adapters)
        self._chosen: tuple[Any, Sequence[Any] | None] = (None, None)  # inputs, and their greedy continuations
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
        adapters = self._adapters.keys(weights=False)
        return {
            "kind": "peft-causal-lm",
            "mixed": self.options.mixed_batch,
            "slots": self.options.full_batch_size is not None,
            "next_tokens": self.options.next_tokens,
            "adapters": adapters,
        }

    def inputs_key(self) -> Mapping[str, Any]:
        """Return what prompts and adapter tensors depend on."""
        rows = {"batch_size", "full_batch_size", "kv_cache_batch_size", "next_tokens", "padding_side"}
        options = self.options.model_dump(mode="json", exclude=rows)
        keys = {"model": self.fingerprint(), "adapters": self._adapters.keys(weights=True)}
        return {**self.asked(), "tokenizer": self.tokenizer_key(), "options": options, **keys}

    def asked(self) -> Mapping[str, Any]:
        """Return the texts and the length limits that are tokenized."""
        sizes = ("prefill_seq_len", "ctx_len", "max_new_tokens")
        conversations = {"messages": self._tokenizer.messages()} if self.options.messages is not None else {}
        return {
            "texts": self._tokenizer.texts(),
            **conversations,
            **{name: getattr(self.options, name) for name in sizes},
        }

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what identifies the tokenizer, those in the directories of adapters included."""
        return self._tokenizer.key()

    def reach(self, inputs: Prompts) -> int:
        """Return the number of positions that the graph needs; the context may have more slots."""
        longest = max(tokens.size for tokens in inputs.attended_ids)
        return longest + self.options.max_new_tokens - 1

    def published(self) -> Mapping[str, Any]:
        """Return the ``model_max_length`` of the tokenizer, and the ``bases`` that saved adapters name, if any."""
        return {**tokenizer_length(getattr(self.source, "path", None)), "bases": self._adapters.bases()}

    def tokenize(self) -> Tensors:
        """Tokenize the prompts, and read or create the adapter tensors.

        Raises:
            ConfigError: a prompt and its continuation are longer than the context, or an adapter does not fit.
        """
        rows = self.rows()
        adapted = self._attach_adapters()
        tables = module_tables(adapted.model)
        self._loaded = adapted.base_model()
        notes = [self._tokenizer.note] if self._tokenizer.note else []
        notes += [note for name, tensors in adapted.adapters.items() for note in fp16_notes(name, tensors)]
        about = {"texts": rows.texts, "notes": notes, "pad": rows.pad, "eos": sorted(adapted.eos), "tables": tables}
        notes += [*sampling_notes(adapted.model), *quantization_notes(getattr(self.source, "path", None))]
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
        return self._tokenizer.rows()

    def inputs(self, stored: Tensors) -> Prompts:
        """Return prompts and adapters from their stored form.

        Raises:
            IncomparableError: a tensor is missing, of another dtype, or does not fit the others.
        """
        return prompts_of(stored)

    def interface(self, inputs: Prompts) -> Graph:
        """Return the interface of the graph that serves the adapters of the inputs."""
        return self._graph(inputs.interface, inputs.adapters, starts=bool(inputs.invocation))

    def _graph(self, interface: Interface, adapters: Mapping[str, Tensors], *, starts: bool) -> Graph:
        return decoder_graph(interface, self._served_tensors(adapters), self.options, starts=starts)

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

        tokens = self._adapters.vocabulary(self.case.name)
        model = self.source.causal_lm()
        with translated_errors("give the base the embeddings of its adapters' tokens"):
            self._tokens = grow_vocabulary(model, tokens)
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
        module = Decoder(
            adapted.model,
            layers,
            adapted.parameter_names,
            mixed=mixed,
            virtual=adapted.virtual,
            next_tokens=self.options.next_tokens,
        ).eval()
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
        of, chosen = self._chosen
        steps = self.options.max_new_tokens
        outputs = continuations(model, self._specs(inputs), inputs, steps, dtype, chosen if of is inputs else None)
        self._loaded, self._chosen = model, (inputs, split_steps(outputs["tokens"], outputs["steps"]))
        return outputs

    def ensemble(self, inputs: Prompts, reference: Tensors, precision: Precision) -> Iterator[Tensors]:
        """Yield the original model's logits of the reference's texts, for each variant of `ENSEMBLE`."""
        from qeff_validate.models.causal_lm.reference import ensemble

        texts = split_steps(reference["tokens"], reference["steps"])
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
        model, texts = self._take_model(), split_steps(reference["tokens"], reference["steps"])
        faulty = FaultyReference(model, self._specs(inputs, served=True), inputs, texts, dtype)
        yield from faulty.bodies(by_level["body"])
        yield from faulty.adapters(by_level["adapters"], reference["logits"])
        yield from faulty.logits(by_level["session"], reference["logits"])
        self._loaded = model

    def infer(self, session: Session, inputs: Prompts, reference: Tensors) -> Tensors:
        """Run every prompt with every adapter along the reference's tokens (teacher forcing).

        Returns:
            ``logits``, and ``again``: the logits of second visits to the first two adapters, which must show no state
            left over from others; if the graph chooses ``next_tokens``, ``next_token_gaps`` (`next_tokens`).
        """
        run = run_batched if self.options.mixed_batch else run_sequentially
        forced = split_steps(reference["tokens"], reference["steps"])
        if not self.options.next_tokens:
            return run(session, inputs, self._plan(inputs), forced)
        monitor = NextTokenMonitor(session)
        outputs = run(monitor, inputs, self._plan(inputs), forced)
        return {**outputs, "next_token_gaps": monitor.gaps()}

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
        tokens = split_steps(reference["tokens"], reference["steps"])[at][:step]
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
        lengths = (1,) if inputs.interface.recurrent else options.prefill_lengths
        return Plan(
            options.rows, lengths, options.padding_side, inputs.pad, inputs.eos, options.max_new_tokens,
            invocation=inputs.invocation, slots=options.slots,
        )  # fmt: skip

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
        parts = split_steps(reference["logits"], reference["steps"])
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
        from qeff_validate.models.causal_lm.failure_hints import Serving
        from qeff_validate.models.causal_lm.verdict import judge_continuations

        slotted, virtual = self.options.full_batch_size is not None, inputs.virtual is not None
        serving = Serving(self.options.rows, slotted, virtual, bool(inputs.invocation))
        adapters = list(inputs.adapters)
        verdict = judge_continuations(reference, actual, context, adapters=adapters, inputs=inputs, serving=serving)
        if verdict.status != "fail" or not context.precision.startswith("fp16"):
            return verdict
        if actual["logits"].shape != reference["logits"].shape:
            return verdict
        finite = np.isfinite(actual["logits"]).all(axis=1) | ~np.isfinite(reference["logits"]).all(axis=1)
        if finite.all():
            return verdict
        overflow = self._overflow(inputs, reference, int(np.argmin(finite)))
        return replace(verdict, reason=f"{overflow}; {verdict.reason}") if overflow else verdict

    def _overflow(self, inputs: Prompts, reference: Tensors, row: int) -> str:
        """Return a sentence if the original model leaves the range of fp16 before a row of the logits."""
        ends = np.cumsum(reference["steps"])
        at = int(np.searchsorted(ends, row, side="right"))
        adapter, prompt = divmod(at, len(inputs.ids))
        tokens = split_steps(reference["tokens"], reference["steps"])[at][
            : row - int(ends[at] - reference["steps"][at])
        ]
        text = np.concatenate([inputs.ids[prompt], tokens])
        name = list(inputs.adapters)[adapter]
        try:
            found = self._run_original("beyond_half", replace(inputs, ids=(text,)), name, name, module="half_range")
        except ValidateError:  # there is no original here: the numbers have to do
            return ""
        return str(found)

    def relate(self, name: str, session: Session, inputs: Prompts, context: ComparisonContext) -> Verdict:
        """Check one of `relations.RELATIONS`."""
        from qeff_validate.models.causal_lm.relations import Original, relate

        original = Original(
            merged_logits=lambda adapter, forced: self._run_original("merged_logits", inputs, adapter, forced),
            keys_and_values=lambda adapter: self._run_original("keys_and_values", inputs, adapter),
        )
        return relate(name, session, inputs, self._plan(inputs), context, original)

    def _run_original(self, function: str, inputs: Prompts, adapter: str, *args: Any, module: str = "reference") -> Any:
        """Load the model again, and call a function of a module of `causal_lm` with it and an adapter."""
        if self.case.artifacts.reference is not None:
            raise IncomparableError("the reference is recorded, so there need be no original model here")
        named = self._specs(inputs, served=True)
        if adapter != BASE and adapter not in named:
            raise IncomparableError(
                "the adapters of a model in memory are not put on another one: it is left unchanged"
            )
        run = getattr(import_module(f"qeff_validate.models.causal_lm.{module}"), function)
        return run(self._load_model(), named.get(adapter), inputs.adapters[adapter], inputs.ids, *args)
