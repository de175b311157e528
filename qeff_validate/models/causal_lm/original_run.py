# SPDX-License-Identifier: Apache-2.0
"""One run of the original causal LM on a whole text, for explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qeff_validate.errors import IncomparableError
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.protocols import Graph, OriginalRun
from qeff_validate.tensors import RETAINED, Array, Tensors


def original_run(
    model: Any, graph: Graph, texts: Sequence[Array], adapter: Tensors, sizes: Mapping[str, int], pad: int
) -> OriginalRun:
    """Return one run; see `protocols.Explained`.

    Args:
        model: float32, with the adapter attached by PEFT.
        graph: the interface.
        texts: token ids of prompt and continuation.
        adapter: the adapter's tensors, as the graph is fed them.
        sizes: of the batch, where the graph fixes them.
        pad: id of the padding token.

    Raises:
        IncomparableError: the texts do not fit into the sizes.
    """
    longest = max(text.size for text in texts)
    batch, length = sizes.get("batch_size", len(texts)), sizes.get("seq_len", longest)
    slots = sizes.get("ctx_len", max(longest, graph.buckets[0]["ctx_len"]))
    if batch < len(texts) or length < longest or slots < longest:
        raise IncomparableError(f"{len(texts)} texts of {longest} tokens do not fit into {batch} x {length} of {slots}")
    ids = np.full((batch, length), pad, dtype=np.int64)
    places = np.full((batch, length), -1, dtype=np.int64)
    for row in range(batch):
        text = texts[min(row, len(texts) - 1)]
        ids[row, : text.size], places[row, : text.size] = text, np.arange(text.size)
    dims = {"batch_size": batch, "seq_len": length, "ctx_len": slots}
    feeds: dict[str, Array] = {"input_ids": ids, "position_ids": places, "adapter_ids": np.zeros(batch, np.int64)}
    for spec in graph.inputs:
        if spec.name in adapter:
            feeds[spec.name] = adapter[spec.name]
        elif spec.name not in feeds:
            shape = [dims[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            feeds[spec.name] = np.zeros(shape, dtype=spec.dtype)
    feeds = {spec.name: feeds[spec.name] for spec in graph.inputs}
    tokens = places >= 0
    outputs = {spec.name for spec in graph.outputs}
    layers = _attention_paths(model, outputs)
    owners = {"logits": _head_path(model), **layers}

    def run() -> Tensors:
        with translated_errors("run the Hugging Face model"), torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(tokens.astype(np.int64)),
                position_ids=torch.from_numpy(np.maximum(places, 0)),
                use_cache=False,
            )
        logits = output.logits.double().numpy()
        return {"logits": logits[np.arange(batch), places.argmax(axis=1)][:, None]}

    return OriginalRun(model, feeds, tokens, run, owners)


def _head_path(model: Any) -> str:
    """Return the path of the LM head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
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
