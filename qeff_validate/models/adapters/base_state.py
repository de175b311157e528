# SPDX-License-Identifier: Apache-2.0
"""The state of a base model before an adapter is put on it, and which tensors of an adapter's file are the base's.

PEFT's ``unload`` does not give the base back if an adapter replaces whole modules (``modules_to_save``: the trained
copy stays) or weights of the base (``bias``, embeddings that are saved beside the adapter: they are overwritten).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from qeff_validate.errors import ConfigError
from qeff_validate.tensors import Array

PREFIX = "base_model.model."
"""What PEFT puts before the names of a base model."""

WRAPPERS = re.compile(r"\.(base_layer|token_adapter)(?=\.)")
"""Parts that PEFT inserts into the name of a base weight whose module it wraps."""


ROWS = ".trainable_tokens_delta"
"""End of the name of an adapter's rows of the embedding (``trainable_token_indices``)."""

COPIES = re.compile(r"\.(modules_to_save|original_module)\.(\w+\.)?\w+$")
"""Names under which PEFT saves a module of ``modules_to_save`` again, and the one that it replaces."""


def base_name(saved: str) -> str:
    """Return the name in the base of a weight that PEFT has saved under this name."""
    return WRAPPERS.sub("", saved.removeprefix(PREFIX))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a base by name, tied ones under each of theirs; PEFT may have wrapped its modules."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {base_name(name).replace(".original_module.", "."): parameter for name, parameter in parameters}


def is_base_weight(saved: str, base: Mapping[str, nn.Parameter], shape: tuple[int, ...]) -> bool:
    """Return True for a weight of the base, or a copy of one that is not used, in an adapter's file."""
    weight = base.get(base_name(saved))
    return COPIES.search(saved) is not None or (weight is not None and tuple(weight.shape) == shape)


class BaseState:
    """The modules of a model, and copies of the weights that adapters overwrite.

    Args:
        model: the base, without an adapter.
        saved: names of the tensors of the adapters that will be put on it; weights of the base among them are copied.
    """

    def __init__(self, model: nn.Module, saved: Iterable[str] = ()) -> None:
        self._model = model
        self._modules = [(module, type(module), _shallow(vars(module))) for module in model.modules()]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        overwritten = {name: parameters[name] for name in map(base_name, saved) if name in parameters}
        self._copies = [(parameter, parameter.detach().clone()) for parameter in overwritten.values()]

    def restore(self) -> Any:
        """Return the model as it was; a PeftModel around it must not be used afterwards."""
        for module, kind, state in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(_shallow(state))
        for parameter, required in self._requires_grad:
            parameter.requires_grad_(required)
        with torch.no_grad():
            for parameter, content in self._copies:
                parameter.copy_(content)
        return self._model


def _shallow(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a module's attributes and its dicts of children, parameters and hooks, but no tensor."""
    return {key: copy.copy(value) if isinstance(value, (dict, set)) else value for key, value in state.items()}


def split_base_weights(
    tensors: Mapping[str, Array], own: Collection[str], base: Mapping[str, nn.Parameter], adapter: str, known: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the tensors of an adapter, and the weights of the base that its file replaces, by their name in the base.

    PEFT saves weights of the base beside adapters of embeddings and heads, and where the vocabulary has grown, and
    loads them over the base's. Those that are equal are left out, as are copies of ``modules_to_save`` that are not
    used. Weights that are tied in the base appear once.

    Args:
        tensors: of the adapter's file, by saved name.
        own: names that PEFT saves for the adapter's options on this base.
        base: parameters of the base by name, tied ones under each of their names.
        adapter: its name, for messages.
        known: number of tokens of the base before its vocabulary grew.

    Raises:
        ConfigError: a weight is not the base's where it must be, or two copies of a tied one differ.
    """
    adapters: dict[str, Array] = {}
    replaced: dict[str, Array] = {}
    first: dict[int, str] = {}
    learnt = [key for key in own if key.endswith(ROWS) and key in tensors]
    for key, array in tensors.items():
        name = base_name(key)
        twins = (other for other in learnt if key not in own and _one_table(key, other, base))
        if any(np.array_equal(array, tensors[twin]) for twin in twins):
            continue  # rows of a tied table, which PEFT has saved under both of its names
        if key in own or (name not in base and not COPIES.search(key)):
            adapters[key] = array
            continue
        if COPIES.search(key):
            continue
        weight = base[name]
        if tuple(weight.shape) != array.shape:
            raise ConfigError(
                f"adapter {adapter!r}: {key} has the shape {list(array.shape)}, the layer of this base"
                f" {list(weight.shape)}: it was trained on another base, or one with another vocabulary"
            )
        content = weight.detach().float().numpy()
        rows = known if array.shape[0] > known else array.shape[0]
        if WRAPPERS.search(key) and not np.array_equal(content[:rows], array[:rows]):
            raise ConfigError(
                f"adapter {adapter!r}: {key} is not the weight of this base: it was trained on another one"
            )
        same = first.setdefault(id(weight), key)
        if not np.array_equal(array, tensors[same]):
            raise ConfigError(
                f"adapter {adapter!r}: {same} and {key} are one tied weight in this base, and the adapter has two"
                " different ones: it was trained on a base without tied embeddings (tie_word_embeddings)"
            )
        if same == key and not np.array_equal(content, array):
            replaced[name] = array
    return adapters, replaced


def _one_table(one: str, learnt: str, base: Mapping[str, nn.Parameter]) -> bool:
    """Return True if a name is that of learnt rows of the same tied weight as ``learnt``, another such name."""
    if not one.endswith(ROWS):
        return False
    first, second = (base.get(f"{base_name(name).removesuffix(ROWS)}.weight") for name in (one, learnt))
    return first is not None and first is second


def grow_vocabulary(model: Any, rows: int) -> int:
    """Give the base embeddings for as many tokens as its adapters have; return the number of tokens before.

    New rows are the mean of the others, which is what transformers draws them around.

    Args:
        model: changed in place.
        rows: tokens of the adapters; no effect if the model has as many.
    """
    before = int(model.get_input_embeddings().weight.shape[0])
    if rows <= before:
        return before
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for name in ("weight", "bias"):
                parameter = getattr(layer, name, None)
                if parameter is not None and parameter.shape[0] == rows:
                    parameter[before:] = parameter[:before].mean(dim=0)
    return before
