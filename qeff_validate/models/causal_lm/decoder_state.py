# SPDX-License-Identifier: Apache-2.0
"""What a decoder keeps between runs: which states it has, and the cache of transformers over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.kv_cache import StateLayer, cache_indices
from qeff_validate.models.causal_lm.recurrent_state import (
    HybridLayer,
    RecurrentLayer,
    names_of_layer,
    recurrent_shapes,
)
from qeff_validate.models.framework_calls import first_line, own_source, returned_cache

Pair = tuple[tuple[int, int], tuple[int, int]]


DUMMY: Any = getattr(cache_utils, "DummyLayer", ())
"""A layer of a cache that keeps nothing; older versions of transformers have none."""


TWO = torch.tensor([[0, 1]])
"""Two tokens, with which states are tried."""


@dataclass(frozen=True, slots=True)
class StateShapes:
    """Sizes of what a decoder keeps.

    Attributes:
        dims: for each layer ``(heads, head_dim)`` of keys and of values; None: it keeps none.
        recurrent: shapes of recurrent states without their batch dim, by the name of the input.
    """

    dims: Sequence[Pair | None]
    recurrent: Mapping[str, tuple[int, ...]]


def state_shapes(model: Any) -> StateShapes:
    """Return what a model keeps between runs, from a run of two tokens.

    Raises:
        ConfigError: it keeps something else than keys and values of each token and recurrent states.
    """
    kind = type(model).__name__
    if any(getattr(module, "use_alibi", False) is True for module in model.modules()):
        raise ConfigError(
            f"{kind} is not supported with alibi: true: it makes its position biases from a two-dimensional mask, and"
            " the exported graph masks by position ids"
        )
    indexer = next(
        (type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Indexer")), None
    )
    if indexer is not None:
        raise ConfigError(
            f"{kind} is not supported: its attention reads the tokens that a {indexer} selects, which keeps keys of"
            " its own beside the cache"
        )
    if "get_query_offset" in own_source(model):
        raise ConfigError(
            f"{kind} is not supported: its attention takes positions from the number of tokens in the cache, and the"
            " rows of a batch have different numbers"
        )
    outputs = _two_tokens(model)
    cache = returned_cache(outputs)
    if cache is None and set(outputs) == {"logits"}:
        if _is_causal(model):
            raise ConfigError(
                f"{kind} is not supported: transformers returns no cache of it, so what it keeps, if anything, is out"
                " of reach"
            )
        raise ConfigError(
            f"{kind} returns logits alone when it is asked for keys and values, so it is no decoder: an encoder is a"
            " body of model: embedding (is_decoder in its config is false?)"
        )
    if not isinstance(cache, Cache) or type(cache).__module__ != Cache.__module__:
        own = "in its outputs" if cache is None else f"in a {type(cache).__name__}"
        raise ConfigError(
            f"{kind} is not supported: it keeps its state in a form of its own ({own}), not in the cache that"
            " transformers' models share"
        )
    layers = cache.layers
    recurrent = recurrent_shapes(layers)
    dims: list[Pair | None] = []
    for at, layer in enumerate(layers):
        keys: Any = getattr(layer, "keys", None)
        values: Any = getattr(layer, "values", None)
        both = all(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in (keys, values))
        if both and keys.shape[2] > TWO.shape[1]:
            raise ConfigError(
                f"{kind} is not supported: it keeps keys of {keys.shape[2]} tokens after two, because it puts tokens of"
                " its own before each text"
            )
        if isinstance(layer, CacheLayerMixin) and not both:
            raise ConfigError(f"{kind} is not supported: layer {at} keeps something else than keys and values")
        dims.append(((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])) if both else None)
    kept = [pair is not None or isinstance(layer, DUMMY) for pair, layer in zip(dims, layers, strict=True)]
    if not all(kept) and not recurrent:  # a layer that shares the keys and values of another has a dummy
        raise ConfigError(f"{kind} is not supported: some of its layers keep neither keys and values nor a state")
    return StateShapes(dims, {name: recurrent[name] for name in state_order(list(recurrent), len(dims))})


def _two_tokens(model: Any) -> Any:
    """Return the outputs of a run of two tokens that keeps the state.

    Raises:
        ConfigError: transformers does not run it.
    """
    kind = type(model).__name__
    with torch.inference_mode():
        try:
            return model(input_ids=TWO, use_cache=True)
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as exc:
            try:
                model(input_ids=TWO, use_cache=False)
            except Exception:
                raise ConfigError(
                    f"{kind} is not supported: transformers itself does not run it on two tokens ({first_line(exc)}):"
                    " its config may not be that of a whole model"
                ) from exc
            raise ConfigError(
                f"{kind} is not supported: transformers itself runs it without its state alone, and fails when it keeps"
                f" keys and values ({first_line(exc)})"
            ) from exc


def _is_causal(model: Any) -> bool:
    """Return True if the logits of a token do not depend on the next one."""
    with torch.inference_mode():
        one, other = (model(input_ids=tokens).logits[0, 0] for tokens in (TWO, TWO + torch.tensor([0, 1])))
    return bool(torch.equal(one, other))


def state_order(names: Sequence[str], layers: int) -> list[str]:
    """Return the names of states in the order of the graph: keys and values by layer, then recurrent ones."""
    attention = [f"past_{name}.{layer}" for layer in range(layers) for name in ("key", "value")]
    recurrent = [name for layer in range(layers) for name in sorted(names_of_layer(names, layer))]
    return [name for name in (*attention, *recurrent) if name in names]


def cache_for(
    state: Mapping[str, Tensor],
    layers: int,
    position_ids: Tensor,
    prefix: Sequence[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Cache:
    """Return a cache over the inputs ``past_key.i``, ``past_value.i`` and recurrent states.

    Args:
        state: inputs by name, ``batch_index`` among them if rows choose their slots.
        layers: number of layers of the cache.
        position_ids: int64 ``[batch, seq_len]``.
        prefix: as in `StateLayer`, by layer.
    """
    size = next((tensor.shape[2] for name, tensor in state.items() if name.startswith("past_key.")), None)
    slots = state.get("batch_index")
    places = None if size is None else cache_indices(position_ids, size, slots)

    def layer(at: int) -> Any:
        keys, values = state.get(f"past_key.{at}"), state.get(f"past_value.{at}")
        states = {name: state[name] for name in names_of_layer(state, at)}
        if keys is None or values is None or places is None:
            return RecurrentLayer(states, position_ids, slots)
        if states:
            return HybridLayer(states, position_ids, keys, values, places, slots)
        return StateLayer(keys, values, places, None if prefix is None else prefix[at])

    return Cache(layers=[layer(at) for at in range(layers)])


def new_states(cache: Cache, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the states after a run, by name."""
    results: dict[str, Tensor] = {}
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, StateLayer):
            results |= {f"past_key.{at}": layer.keys, f"past_value.{at}": layer.values}
        if isinstance(layer, RecurrentLayer):
            results |= layer.results()
    return {name: results[name] for name in names}
