# SPDX-License-Identifier: Apache-2.0
"""One run of the original body on a padded batch, with other poolings of the same states, for explanations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import IncomparableError
from qeff_validate.models.embedding.pooling import POOLINGS
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.models.token_rows import TokenRows, padded
from qeff_validate.protocols import Graph, OriginalRun
from qeff_validate.tensors import Tensors


def original_run(
    body: Any,
    graph: Graph,
    inputs: TokenRows,
    sizes: Mapping[str, int],
    *,
    pool: Callable[[Floats], Floats],
    finish: Callable[[Floats], Floats],
    side: str,
    parts: int = 1,
) -> OriginalRun:
    """Return one run; see `protocols.Explained`.

    Args:
        body: float32.
        graph: the interface.
        inputs: a few rows.
        sizes: of the batch, where the graph fixes them.
        pool: maps the tokens of a row ``[n, hidden]`` to its vector.
        finish: truncation and normalization of vectors.
        side: of the padding.
        parts: number of poolings whose vectors ``pool`` concatenates.

    Raises:
        IncomparableError: the rows do not fit into the sizes.
    """
    longest = max(ids.size for ids in inputs.ids)
    batch, length = sizes.get("batch_size", len(inputs.ids)), sizes.get("seq_len", longest)
    if batch < len(inputs.ids) or length < longest:
        raise IncomparableError(f"{len(inputs.ids)} rows of {longest} tokens do not fit into {batch} x {length}")
    known = padded(inputs.ids, batch, length, pad=inputs.pad, side=side, types=inputs.types)
    feeds = {spec.name: known[spec.name] for spec in graph.inputs}
    tokens = feeds["attention_mask"].astype(bool)
    states: list[Floats] = []

    def run() -> Tensors:
        with translated_errors("run the Hugging Face model"), torch.no_grad():
            output = body(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        hidden = (output[0] if isinstance(output, tuple) else output.last_hidden_state).double().numpy()
        states[:] = [hidden]
        return pooled(lambda row, seen: pool(row[seen]))

    def pooled(pool_row: Callable[[Floats, Any], Floats]) -> Tensors:
        vectors = [finish(pool_row(row, seen)) for row, seen in zip(states[0], tokens, strict=True)]
        if vectors[0].ndim == 1:
            return {"output": np.stack(vectors)}
        full = np.zeros((*tokens.shape, vectors[0].shape[-1]))
        full[tokens] = np.concatenate(vectors)
        return {"output": full}

    def other_poolings() -> Mapping[str, Tensors]:
        if inputs.per_token:
            return {}
        hidden, mask = torch.from_numpy(states[0]), torch.from_numpy(tokens.astype(np.int64))
        results: dict[str, Tensors] = {}
        for name, function in POOLINGS.items():
            if name not in ("none", "avg"):
                vectors = function(hidden, mask).numpy()
                results[f"pooled by {name.replace('_', ' ')}"] = {"output": finished(vectors)}
        results |= {text: {"output": finished(vectors.numpy())} for text, vectors in _mistaken(hidden, mask)}
        summed = (hidden * mask[..., None]).sum(1)
        results["the sum in place of the mean"] = {"output": finished(summed.numpy())}
        count = mask.sum(1, keepdim=True) + 1
        results["the mean over one token too many"] = {"output": finished((summed / count).numpy())}
        place = (mask.cumsum(1) * mask)[..., None]
        last = mask.sum(1)[:, None, None]
        for kept, name in ((place > 1, "first"), ((place < last) & (place > 0), "last")):
            total = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
            results[f"the mean without the {name} token"] = {"output": finished(total.numpy())}
        for most in range(1, tokens.shape[1]):
            kept = (place > 0) & (place <= most)
            total = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
            results[f"the mean of the first {most} tokens"] = {"output": finished(total.numpy())}
        raw = run_unfinished()
        results["not normalized"] = {"output": raw}
        lengths = np.linalg.norm(raw, axis=-1, keepdims=True)
        results["normalized"] = {"output": raw / np.where(lengths > 0, lengths, 1)}
        row_0 = pooled(lambda row, seen: pool(states[0][0][seen]))  # noqa: ARG005
        results["every row pooled from the states of the first"] = row_0
        return results

    def finished(vectors: Floats) -> Floats:
        return np.stack([finish(np.tile(vector, parts)) for vector in vectors])

    def run_unfinished() -> Floats:
        return np.stack([pool(row[seen]) for row, seen in zip(states[0], tokens, strict=True)])

    return OriginalRun(body, feeds, tokens, run, {"output": "pooling"}, other_poolings)


def _mistaken(hidden: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield vectors ``[batch, hidden]`` of poolings that lose the mask or a place, each with what is wrong."""
    everything, first = torch.ones_like(mask), hidden[:1].expand_as(hidden)
    yield "pooled without the mask", POOLINGS["mean"](hidden, everything)
    for name in ("max", "last", "cls"):
        yield f"pooled by {name} without the mask", POOLINGS[name](hidden, everything)
    for name in ("mean", "max", "last", "cls"):
        yield f"every row pooled by {name} from the states of the first", POOLINGS[name](first, mask)
    rows, last = torch.arange(len(hidden)), mask.cumsum(1).argmax(1)
    for back in (1, 2):
        yield f"pooled by the token {back} before the last", hidden[rows, (last - back).clamp(min=0)]
    yield "pooled by the second token", hidden[:, min(1, hidden.shape[1] - 1)]
