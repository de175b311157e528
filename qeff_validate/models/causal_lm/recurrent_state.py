# SPDX-License-Identifier: Apache-2.0
"""Recurrent and convolutional state of a decoder (Mamba, gated delta rule, short convolutions) as inputs of a graph.

The layers of transformers continue from such a state one token at a time, so a graph with one takes one token of each
row per run. A row starts with zeros at position 0, whatever its state held before, and padding (position −1) leaves its
state as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from qeff_validate.models.causal_lm.decoder_interface import RECURRENT
from qeff_validate.models.causal_lm.kv_cache import CacheIndices, StateLayer


def recurrent_shapes(layers: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each recurrent state without its batch dim, by the name of its input.

    Args:
        layers: of a transformers cache after a run.
    """
    shapes = {}
    for at, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for kind, states in zip(RECURRENT, (layer.conv_states, layer.recurrent_states), strict=True):
                for index, state in states.items():
                    if state is not None:
                        shapes[_name(kind, at, index)] = tuple(state.shape[1:])
    return shapes


def _name(kind: str, layer: int, index: int) -> str:
    return f"{kind}.{layer}" if index == 0 else f"{kind}.{layer}.{index}"


def names_of_layer(names: Iterable[str], layer: int) -> list[str]:
    """Return the names of the recurrent states of a layer among the inputs."""
    return [name for name in names if name.partition(".")[0] in RECURRENT and name.split(".")[1] == str(layer)]


class RecurrentLayer(LinearAttentionCacheLayerMixin):  # type: ignore[misc]  # transformers is Any to mypy here
    """Recurrent states of one layer.

    Args:
        states: retained states ``[batch or slots, …]``, by the name of the input.
        position_ids: of the run, ``[batch, 1]``.
        slots: slot of each row's text, int64 ``[batch, 1]``; None: a text has its row's state.
    """

    def __init__(self, states: Mapping[str, Tensor], position_ids: Tensor, slots: Tensor | None = None) -> None:
        indices = [int(name.split(".")[2]) if name.count(".") == 2 else 0 for name in states]
        LinearAttentionCacheLayerMixin.__init__(self, max(indices, default=0) + 1)
        self._names = {(name.partition(".")[0], index): name for name, index in zip(states, indices, strict=True)}
        self._retained, self._positions = dict(states), position_ids
        self._slots = None if slots is None else slots.reshape(-1)
        for (kind, index), name in self._names.items():
            state = self._of_rows(states[name])
            start = torch.where(self._rows(position_ids == 0, state), 0.0, state)
            self._by_kind(kind)[index] = start  # a new tensor: layers change it in place
            self.has_previous_state[index] = True
            if kind == RECURRENT[0]:
                self.is_conv_states_initialized[index] = True
                self.conv_kernel_size[index] = start.shape[-1]
            else:
                self.is_recurrent_states_initialized[index] = True

    def _by_kind(self, kind: str) -> dict[int, Any]:
        by_index: dict[int, Any] = self.conv_states if kind == RECURRENT[0] else self.recurrent_states
        return by_index

    def _of_rows(self, state: Tensor) -> Tensor:
        return state if self._slots is None else state.index_select(0, self._slots)

    def _rows(self, condition: Tensor, state: Tensor) -> Tensor:
        return condition.reshape(-1, *[1] * (state.ndim - 1))

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Do nothing: the states are there."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Append new columns, and return all; the state keeps the last."""
        whole = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        self.conv_states[state_idx] = whole[..., -self.conv_kernel_size[state_idx] :]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Replace the state."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def results(self) -> dict[str, Tensor]:
        """Return the new states by the name of the input; those of rows of padding are unchanged."""
        padding, results = self._positions < 0, {}
        for (kind, index), name in self._names.items():
            retained = self._retained[name]
            old = self._of_rows(retained)
            new = torch.where(self._rows(padding, old), old, self._by_kind(kind)[index])
            results[name] = new if self._slots is None else retained.index_put((self._slots,), new)
        return results


class HybridLayer(RecurrentLayer, StateLayer):
    """A layer with recurrent states, and keys and values beside them.

    Args:
        states: as in `RecurrentLayer`.
        position_ids: of the run.
        keys: as in `StateLayer`, with ``values`` and ``places``.
        slots: as in `RecurrentLayer`.
    """

    def __init__(
        self,
        states: Mapping[str, Tensor],
        position_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        places: CacheIndices,
        slots: Tensor | None = None,
    ) -> None:
        StateLayer.__init__(self, keys, values, places)
        RecurrentLayer.__init__(self, states, position_ids, slots)
