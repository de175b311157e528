# SPDX-License-Identifier: Apache-2.0
"""A transformers cache of fixed size outside the model: keys and values are inputs and outputs of the graph.

Each row writes its tokens at their own positions, so rows of one batch may have different lengths, and padding
(position −1) writes nothing. Slots that were never written may hold any value, even NaN: attention reads a written
one in their place, because 0 · NaN is NaN (design §5).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers.cache_utils import CacheLayerMixin


@dataclass(frozen=True, slots=True)
class CacheIndices:
    """Slots that the tokens of a run are written to, and slots that are read; computed once for all layers.

    Padding repeats the write of the row's token at the greatest position, or, in a row of padding only, writes the
    content of slot 0. So every index is in range, and equal indices carry equal values: the result does not depend on
    the runtime. In place of a slot that was never written, which is masked, the one of the row's last token is read:
    runtimes gather faster than they replace. A row of padding only reads that of another row, so that it computes with
    finite numbers; nobody reads its results.

    Attributes:
        source: index of the token to write for each token, int64 ``[batch, 1, seq_len, 1]``.
        slot: slot to write to, int64 ``[batch, 1, seq_len]``.
        row: where the row's text is in the cache, int64 ``[batch, 1, 1]``.
        by_slot: there may be more texts in the cache than rows of the batch, in another order.
        empty: True for rows of padding only, bool ``[batch, 1, seq_len, 1]``.
        read_row: where the text is that the row reads, int64 ``[batch, 1, 1]``.
        read_slot: slot that is read for each slot, int64 ``[batch, 1, ctx_len]``.
        heads: indices of heads by their number, int64 ``[1, heads, 1]``, filled as layers ask for them: what a graph
            computes of the same tensors it computes once for all layers.
        reads: by the number of heads, where in a state ``[slots * heads * ctx_len, head_dim]`` it is that each slot
            reads, int64 ``[batch, heads, ctx_len]``.
    """

    source: Tensor
    slot: Tensor
    row: Tensor
    by_slot: bool
    empty: Tensor
    read_row: Tensor
    read_slot: Tensor
    heads: dict[int, Tensor] = field(default_factory=dict)
    reads: dict[int, Tensor] = field(default_factory=dict)

    def of_rows(self, state: Tensor) -> Tensor:
        """Return the state ``[slots, …]`` of each row's text, ``[batch, …]``."""
        return state.index_select(0, self.row.reshape(-1)) if self.by_slot else state

    def read(self, state: Tensor) -> Tensor:
        """Return what attention reads of a state ``[slots, heads, ctx_len, head_dim]``, ``[batch, heads, …]``."""
        number, length = state.shape[1], self.read_slot.shape[-1]
        if number not in self.reads:
            self.reads[number] = (self.read_row * number + self.each_head(state)) * length + self.read_slot
        # ONNX Runtime gathers rows of a matrix faster than parts of four dims
        return embedding(self.reads[number], state.reshape(-1, state.shape[-1]))

    def each_head(self, state: Tensor) -> Tensor:
        """Return the indices of the heads of a state ``[slots, heads, …]``, int64 ``[1, heads, 1]``."""
        number = state.shape[1]
        if number not in self.heads:
            self.heads[number] = torch.arange(number, device=state.device).reshape(1, -1, 1)
        return self.heads[number]


def cache_indices(position_ids: Tensor, slots: int, batch_index: Tensor | None = None) -> CacheIndices:
    """Return the indices of a run.

    Args:
        position_ids: int64 ``[batch, seq_len]``, −1 for padding.
        slots: tokens that the cache of a text holds.
        batch_index: where each row's text is in the cache, all different, int64 ``[batch, 1]``; None: in its row.
    """
    batch, length = position_ids.shape
    device = position_ids.device
    last = position_ids.argmax(dim=1, keepdim=True)
    source = torch.where(position_ids >= 0, torch.arange(length, device=device), last)
    places = position_ids.gather(1, source).reshape(batch, 1, length)
    row = (torch.arange(batch, device=device) if batch_index is None else batch_index).reshape(batch)
    greatest, each = position_ids.amax(dim=1, keepdim=True), torch.arange(slots, device=device)
    longest = greatest.argmax(dim=0)
    written = torch.where(greatest >= 0, greatest, greatest.gather(0, longest[None])).clamp(min=0)
    return CacheIndices(
        source=source.reshape(batch, 1, length, 1),
        slot=places.clamp(min=0),
        row=row.reshape(batch, 1, 1),
        by_slot=batch_index is not None,
        empty=(places < 0).reshape(batch, 1, length, 1),
        read_row=torch.where(greatest[:, 0] >= 0, row, row.gather(0, longest)).reshape(batch, 1, 1),
        read_slot=torch.where(each <= greatest, each, written).reshape(batch, 1, slots),
    )


class StateLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is Any to mypy here
    """Keys and values of one layer, ``[batch or slots, heads, ctx_len, head_dim]``.

    Args:
        keys: retained keys.
        values: retained values.
        places: slots that new tokens are written to and read from.
        prefix: which tokens are virtual, bool ``[batch, 1, seq_len, 1]``, and their keys and values
            ``[batch, heads, seq_len, head_dim]``, which stand in for those that the layer computes; None: no token.
    """

    is_sliding = False

    def __init__(
        self, keys: Tensor, values: Tensor, places: CacheIndices, prefix: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        CacheLayerMixin.__init__(self)
        self._prefix = prefix
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the state is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens at their positions; return keys and values without the content of unwritten slots."""
        if self._prefix is not None:
            is_virtual, keys, values = self._prefix
            key_states = torch.where(is_virtual, keys, key_states)
            value_states = torch.where(is_virtual, values, value_states)
        self.keys = write_tokens(self.keys, key_states, self._places)
        self.values = write_tokens(self.values, value_states, self._places)
        return self._places.read(self.keys), self._places.read(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of slots, and 0 as the offset of the first."""
        return int(self.keys.shape[2]), 0

    def get_seq_length(self) -> int:
        """Return 0: positions are inputs."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return int(self.keys.shape[2])


def write_tokens(state: Tensor, new: Tensor, places: CacheIndices) -> Tensor:
    """Return the state ``[slots, h, ctx, d]`` with the tokens of ``new`` ``[b, h, s, d]`` written to their places."""
    updates = new.gather(2, places.source.expand(new.shape))
    updates = torch.where(places.empty, places.of_rows(state.narrow(2, 0, 1)), updates)
    return state.index_put((places.row, places.each_head(state), places.slot), updates)


MASKED = frozenset({"chunked_attention", "full_attention", "sliding_attention"})
"""Types of layers that attend to tokens under a mask; others keep a state, and padding leaves it as it is."""

MASKED_AS: Mapping[str, str] = {
    "attention": "full_attention", "hybrid": "full_attention", "hybrid_sliding": "sliding_attention",
    "mlp": "full_attention", "moe": "full_attention",
}  # fmt: skip
"""Types of layers without a mask of their own kind."""

BESIDE: Mapping[str, None] = {"conv": None, "linear_attention": None}
"""Masks of the recurrent parts of hybrid layers: their states heed padding themselves (`recurrent_state`)."""


def masks_by_window(model: Any) -> bool:
    """Return False for a model whose code makes no masks of a sliding window, whatever its config says (Moshi)."""
    families = {cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")}
    makers = ("create_sliding_window_causal_mask", "create_masks_for_generate")
    return not families or any(hasattr(sys.modules[family], maker) for family in families for maker in makers)


def masks(
    position_ids: Tensor, slots: int, config: Any, dtype: torch.dtype, *, windowed: bool = True
) -> Tensor | dict[str, Tensor] | dict[str, Tensor | None]:
    """Return the additive attention mask ``[batch, 1, seq_len, slots]`` in the form that the architecture takes.

    A slot is visible to tokens at its position and later ones, within the sliding window or the chunk if there is one;
    padding sees slot 0, because the softmax over nothing is NaN where masks overflow in half precision.
    The result is one mask if all layers have the same type, else a mask by type of layer. Without ``windowed`` a config
    with a window and no types of layers is that of a model that masks nothing by it.
    """
    position_ids = position_ids.clamp(min=0)
    places = torch.arange(slots, device=position_ids.device)
    full = places <= position_ids[..., None]
    window: int | None = getattr(config, "sliding_window", None)
    own = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    types = {MASKED_AS.get(kind, kind) for kind in own}
    if not types and window and windowed:
        types = {"sliding_attention"}

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]

    masks_by_type = {"full_attention": additive(full)}
    if "sliding_attention" in types and window:
        masks_by_type["sliding_attention"] = additive(full & (places > position_ids[..., None] - window))
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in types and chunk:
        same_chunk = places // chunk == torch.div(position_ids[..., None], chunk, rounding_mode="floor")
        masks_by_type["chunked_attention"] = additive(full & same_chunk)
    recurrent = types - MASKED
    if any(kind.startswith("hybrid") for kind in own) and not recurrent:
        return {**masks_by_type, **{kind: masks_by_type[MASKED_AS[kind]] for kind in own & MASKED_AS.keys()}, **BESIDE}
    if recurrent:
        return {**masks_by_type, "linear_attention": None, **dict.fromkeys(recurrent)}
    if len(types) > 1:
        return masks_by_type
    only = next(iter(types), "full_attention")
    return masks_by_type.get(only, masks_by_type["full_attention"])


def prefix_states(
    is_virtual: Tensor, content: Tensor, state: Mapping[str, Tensor], layers: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return which tokens are virtual, and their keys and values, for each layer; see `StateLayer`.

    Args:
        is_virtual: bool ``[batch, seq_len]``.
        content: of prefix tuning, ``[batch, seq_len, layers · 2 · heads · head_dim]``.
        state: keys and values, which are alike in all layers.
        layers: number of layers.
    """
    _, heads, _, size = state["past_key.0"].shape
    by_layer = content.reshape(*content.shape[:2], 2 * layers, heads, size).permute(2, 0, 3, 1, 4)
    chosen = is_virtual[:, None, :, None]
    return [(chosen, by_layer[2 * layer], by_layer[2 * layer + 1]) for layer in range(layers)]
