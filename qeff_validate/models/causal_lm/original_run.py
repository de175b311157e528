# SPDX-License-Identifier: Apache-2.0
"""One run of the original causal LM on a whole text, for explanations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from qeff_validate.errors import IncomparableError
from qeff_validate.models.framework_calls import base_of, cache_argument, translated_errors
from qeff_validate.protocols import Graph, OriginalRun
from qeff_validate.tensors import RETAINED, Array, Tensors


def original_run(
    model: Any,
    graph: Graph,
    text: Array,
    adapter: Tensors,
    sizes: Mapping[str, int],
    *,
    pad: int,
    adapter_id: int,
    start: int,
    steps: int = 0,
) -> OriginalRun:
    """Return one run; see `protocols.Explained`.

    Args:
        model: float32, with the adapter attached by PEFT.
        graph: the interface.
        text: token ids of prompt and continuation.
        adapter: the adapter's tensors, as the graph is fed them.
        sizes: of the batch, where the graph fixes them.
        pad: id of the padding token.
        adapter_id: of the adapter among those that a mixed batch serves.
        start: position from which on the adapter acts (activated LoRA).
        steps: tokens of the continuation.

    Raises:
        IncomparableError: the text does not fit into the sizes.
    """
    batch, length = sizes.get("batch_size", 1), sizes.get("seq_len", text.size)
    slots = sizes.get("ctx_len", max(text.size, graph.buckets[0]["ctx_len"]))
    if length < text.size or slots < text.size:
        raise IncomparableError(f"a text of {text.size} tokens does not fit into {length} tokens and {slots} slots")
    ids = np.full((batch, length), pad, dtype=np.int64)
    places = np.full((batch, length), -1, dtype=np.int64)
    for row in range(batch):
        ids[row, : text.size], places[row, : text.size] = text, np.arange(text.size)
    texts = sizes.get("full_batch_size", batch)
    dims = {"batch_size": batch, "seq_len": length, "ctx_len": slots, "full_batch_size": texts}
    feeds: dict[str, Array] = {"input_ids": ids, "position_ids": places, "adapter_ids": np.full(batch, adapter_id)}
    feeds |= {"adapter_start": np.full(batch, start), "batch_index": np.arange(batch)[:, None]}
    for spec in graph.inputs:
        if spec.name in adapter:
            feeds[spec.name] = adapter[spec.name]
        elif spec.name not in feeds:
            shape = [dims[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            feeds[spec.name] = np.zeros(shape, dtype=spec.dtype)
    feeds = {spec.name: feeds[spec.name] for spec in graph.inputs}
    tokens = places >= 0
    layers = _attention_paths(model, {spec.name for spec in graph.outputs})
    owners = {"logits": _head_path(model), **layers}
    shapes = {spec.name: (texts, spec.shape[1], slots, spec.shape[-1]) for spec in graph.outputs if spec.name in layers}

    def run() -> Tensors:
        cache = RecordingCache(text.size, slots)
        with translated_errors("run the Hugging Face model"), torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(tokens.astype(np.int64)),
                position_ids=torch.from_numpy(np.maximum(places, 0)),
                use_cache=True,
                **{cache_argument(model): cache},
            )
        logits = output.logits.double().numpy()
        last = logits[np.arange(batch), places.argmax(axis=1)][:, None]
        return {"logits": last, **_keys_and_values(cache, shapes, tokens)}

    return OriginalRun(model, feeds, tokens, run, owners, steps=steps)


class RecordingCache(DynamicCache):  # type: ignore[misc]  # transformers is Any to mypy here
    """A cache that keeps what each layer gives it and hands it back, so that a module can be run again by itself.

    Args:
        tokens: of the text.
        slots: tokens that the cache of the graph holds; in place of those that are not written it reads the last one.
    """

    def __init__(self, tokens: int, slots: int) -> None:
        super().__init__()
        self.tokens, self.slots = tokens, slots
        self.recorded: dict[tuple[str, int], Any] = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep and return keys and values, ``[batch, heads, tokens, head_dim]``."""
        self.recorded["key", layer_idx], self.recorded["value", layer_idx] = key_states, value_states
        return key_states, value_states


def _keys_and_values(
    cache: RecordingCache, shapes: Mapping[str, tuple[Any, ...]], tokens: Array
) -> Mapping[str, Array]:
    """Return keys and values as a graph retains them, zero where no token stands, float64.

    Those that a graph retains in another shape are left out.
    """
    found: dict[str, Array] = {}
    batch, length = tokens.shape
    for name, shape in shapes.items():
        side, _, index = name.removeprefix("past_").removesuffix(RETAINED).partition(".")
        tensor = cache.recorded.get((side, int(index)))
        if tensor is not None and tuple(tensor.shape) == (batch, shape[1], length, shape[3]):
            found[name] = np.zeros(shape)  # slots without a row hold nothing
            found[name][:batch, :, :length] = np.where(tokens[:, None, :, None], tensor.double().numpy(), 0)
    return found


def _head_path(model: Any) -> str:
    """Return the path of the LM head."""
    head = base_of(model).get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "lm_head")


def _attention_paths(model: Any, outputs: set[str]) -> dict[str, str]:
    """Return the path of each layer's attention, by the name of its keys and values."""
    paths = [path for path, module in model.named_modules() if getattr(module, "layer_idx", None) is not None]
    attentions = [path for path in paths if "att" in path.rpartition(".")[2].lower()]
    named = {}
    for index, path in enumerate(attentions):
        for name in ("key", "value"):
            if f"past_{name}.{index}{RETAINED}" in outputs:
                named[f"past_{name}.{index}{RETAINED}"] = path
    return named
