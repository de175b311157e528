# SPDX-License-Identifier: Apache-2.0
"""Runs the original language model with faults in its modules, in the tensors of an adapter, or in its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from qeff_validate.errors import ValidateError
from qeff_validate.models.adapters.base_state import BaseState
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.models.causal_lm.reference import adapted_models, batched_logits, load_adapter
from qeff_validate.models.emulation.float64 import compute_in_dtype, one_thread_if_small
from qeff_validate.models.emulation.precision import ComputationVariant
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.protocols import Change
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec

PLAIN = ComputationVariant("as published, batches of 8", batch=8)


class FixedLogitsSession:
    """A session whose run returns fixed logits ``[n, 1, vocab]``."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", "float32", ("batch_size", 1, "vocab")),)
    shapes: tuple[Shapes, ...] = ()

    def __init__(self, logits: Array) -> None:
        self._logits = logits

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:  # noqa: ARG002
        """Return the logits of all rows."""
        return {"logits": self._logits[:, None].copy()}

    def reset(self) -> None:
        """Do nothing: there is no state."""


class FaultyReference:
    """Runs continuations with faults.

    Args:
        model: the base, or a user's `PeftModel`.
        named: directory of each adapter, or its PEFT options.
        inputs: prompts and tensors of ``base`` and each adapter.
        texts: the continuations, in the order adapter, prompt.
        dtype: ``float32`` or ``float64``.
    """

    def __init__(
        self, model: Any, named: Mapping[str, str | Mapping[str, Any]], inputs: Any, texts: Sequence[Array], dtype: str
    ) -> None:
        self._dtype = dtype
        self._model, self._named, self._inputs = model, named, inputs
        size = len(inputs.ids)
        self._texts = {name: texts[size * at : size * (at + 1)] for at, name in enumerate(inputs.adapters)}

    def bodies(self, changes: Sequence[Change]) -> Iterator[tuple[str, Tensors]]:
        """Yield the logits with each fault of the modules."""
        logits: dict[str, list[Array]] = {change.name: [] for change in changes}
        models = adapted_models(self._model, self._named, self._inputs.adapters)
        for adapter, adapted in zip(self._texts, models, strict=True):
            # converted before the fault is applied: conversion replaces buffers, and the fault is undone in its own
            with compute_in_dtype(adapted, self._dtype, probe=partial(self._run, adapted, adapter)):
                for change in changes:
                    try:
                        with change.applied_to(adapted):
                            logits[change.name] += self._run(adapted, adapter)
                    except ValidateError:
                        logits.pop(change.name, None)
            changes = [change for change in changes if change.name in logits]
        yield from ((name, {"logits": np.concatenate(rows)}) for name, rows in logits.items())

    def adapters(self, changes: Sequence[Change], reference: Array) -> Iterator[tuple[str, Tensors]]:
        """Yield the logits with each fault of adapter inputs; unchanged adapters have those of the reference."""
        adapters = self._inputs.adapters
        rows = dict(zip(adapters, np.split(reference, self._adapter_boundaries()), strict=True))
        for change in () if isinstance(self._model, PeftModel) else changes:
            try:
                served = {name: change.change(name, adapters) for name in adapters}
                parts = [
                    rows[name]
                    if _equal_tensors(tensors, adapters[name])
                    else np.concatenate(self._run_with_tensors(name, tensors))
                    for name, tensors in served.items()
                ]
            except ValidateError:
                continue
            yield change.name, {"logits": np.concatenate(parts)}

    def logits(self, changes: Sequence[Change], reference: Array) -> Iterator[tuple[str, Tensors]]:
        """Yield the logits with each fault of a session's outputs."""
        for change in changes:
            try:
                outputs = change.change(FixedLogitsSession(reference)).run({})
            except ValidateError:
                continue
            yield change.name, {"logits": outputs["logits"][:, 0]}

    def _adapter_boundaries(self) -> Array:
        return np.cumsum([sum(text.size for text in texts) for texts in self._texts.values()])[:-1]

    def _run_with_tensors(self, name: str, tensors: Tensors) -> list[Array]:
        """Run the texts of an adapter with the tensors of another one or with changed tensors."""
        adapters = self._inputs.adapters
        owner = next((other for other in adapters if _equal_tensors(tensors, adapters[other])), name)
        if owner == BASE and _equal_tensors(tensors, adapters[BASE]):
            with compute_in_dtype(self._model, self._dtype, probe=partial(self._run, self._model, name)):
                return self._run(self._model, name)
        kind = self._named[owner if owner != BASE else next(iter(self._named))]
        before = BaseState(self._model, tensors)
        adapted = load_adapter(self._model, kind, tensors)
        try:
            with compute_in_dtype(adapted, self._dtype, probe=partial(self._run, adapted, name)):
                return self._run(adapted, name)
        finally:
            before.restore()

    def _run(self, model: Any, adapter: str) -> list[Array]:
        prompts, texts = self._inputs.ids, self._texts[adapter]
        whole = [np.concatenate([prompt, text]) for prompt, text in zip(prompts, texts, strict=True)]
        with translated_errors("run the Hugging Face model"), torch.no_grad(), one_thread_if_small(model):
            starts = [prompt.size for prompt in prompts]
            return batched_logits(model, PLAIN, texts=whole, starts=starts, pad=self._inputs.pad)


def _equal_tensors(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(array, second[name]) for name, array in first.items())
