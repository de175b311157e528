# SPDX-License-Identifier: Apache-2.0
"""Prompts and adapters as a session is fed them, and their stored form. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qeff_validate.errors import IncomparableError
from qeff_validate.json_tensor import parse_json_tensor
from qeff_validate.models.causal_lm.decoder_interface import Interface
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.models.causal_lm.virtual_tokens import VirtualTokens
from qeff_validate.models.token_rows import RowsText, split_ids
from qeff_validate.tensors import Array, Tensors


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


class PromptsText(RowsText):
    """Content of the tensor ``texts``."""

    eos: list[int]
    interface: Interface
    adapters: list[str]
    shared: dict[str, Any] | None = None
    virtual: VirtualTokens | None = None
    invocation: tuple[int, ...] = ()


def prompts_of(stored: Tensors) -> Prompts:
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
            if array.dtype.kind not in "fi":  # supertuning has indices of its weights
                raise IncomparableError(f"tensor 'inputs.{name}/{key}' is {array.dtype}, and weights are numbers")
    return adapters


def split_steps(values: Array, steps: Array) -> list[Array]:
    """Return the rows of each continuation; ``steps`` are their numbers, int64 ``[n]``."""
    return np.split(values, np.cumsum(steps)[:-1])
