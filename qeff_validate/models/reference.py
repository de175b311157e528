# SPDX-License-Identifier: Apache-2.0
"""Runs the original Hugging Face body, row by row, in float32 or float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.metrics import Floats
from qeff_validate.models.order import probes, refuse_change
from qeff_validate.models.pooling import pooled, resolve_pooling
from qeff_validate.models.sources import foreign
from qeff_validate.tensors import Array

LARGE = 1 << 28
"""Bytes of float32 weights beyond which a body is widened layer by layer: slower, in half the memory."""


def hidden_states(
    body: nn.Module, ids: Sequence[Array], dtype: str, labels: Sequence[str] = ()
) -> Iterator[Floats | None]:
    """Yield the hidden states of each row ``[n, hidden]`` in float64; None for a row without a token.

    Each row runs by itself at its natural length, so no padding and no neighbour can touch it. With ``labels`` some
    rows run once more at the end.

    Raises:
        UnstableReferenceError: at the end, if these give other values than before.
    """

    def run(row: int) -> Floats:
        states: Floats = _states(body, ids[row])[0].to(torch.float64).numpy()
        return states

    repeated = probes([row.size for row in ids]) if labels else []
    first: dict[int, Floats] = {}
    with torch.inference_mode(), computing_in(body, dtype, probe=lambda: _states(body, max(ids, key=len)[:2])):
        for row in range(len(ids)):
            states = run(row) if ids[row].size else None
            if states is not None and row in repeated:
                first[row] = states
            yield states
        refuse_change(first, run, labels)


def batched_states(body: nn.Module, ids: Sequence[Array], pad: int, batch: int) -> list[Floats | None]:
    """Return the hidden states of each row ``[n, hidden]`` in float64; None for a row without a token.

    Rows run together, the last one first, padded on the right to the longest of their batch.
    """
    found: list[Floats | None] = [None] * len(ids)
    filled = [row for row in reversed(range(len(ids))) if ids[row].size]
    for start in range(0, len(filled), batch):
        rows = filled[start : start + batch]
        length = max(ids[row].size for row in rows)
        padded = np.stack([np.pad(ids[row], (0, length - ids[row].size), constant_values=pad) for row in rows])
        mask = np.stack([np.arange(length) < ids[row].size for row in rows])
        states = _states(body, padded, mask)
        for row, hidden in zip(rows, states, strict=True):
            found[row] = hidden[: ids[row].size].to(torch.float64).numpy()
    return found


def left_padding_shift(body: nn.Module, ids: Sequence[Array], pad: int) -> float:
    """Return the worst relative L2, over a short and a long row, of hidden states under left padding against none."""
    by_length = sorted((row for row in ids if row.size), key=len)
    shifts = []
    with torch.inference_mode():
        for row in (by_length[0], by_length[-1]):
            padded = np.concatenate([np.full(5, pad), row])
            moved = _states(body, padded, np.arange(padded.size) >= 5)[0, 5:]
            alone = _states(body, row)[0]
            shifts.append(float((moved - alone).norm() / alone.norm()))
    return float(np.max(shifts))  # NaN, if one of them is


def _states(body: nn.Module, row: Array, mask: Array | None = None) -> Any:
    """Run rows of one length: ids and mask are ``[n]`` or ``[rows, n]``."""
    tokens = torch.from_numpy(np.atleast_2d(np.ascontiguousarray(row)))
    attended = torch.ones_like(tokens) if mask is None else torch.from_numpy(np.atleast_2d(mask).astype(np.int64))
    with foreign("run the Hugging Face model"):
        out: Any = body(input_ids=tokens, attention_mask=attended)
    hidden = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(
            f"{type(body).__name__} returns no last_hidden_state but {', '.join(out.keys())}:"
            " give the body (AutoModel), not a model with a task head"
        )
    return hidden


def pooled_alone(pooling: Any, tokens: Floats, dtype: str) -> Floats:
    """Run a custom torch pooling on one unpadded row ``[n, hidden]`` and return its vector in float64."""
    hidden = torch.from_numpy(tokens).to(getattr(torch, dtype))[None]
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    with torch.inference_mode():
        vector = pooled(resolve_pooling(pooling), pooling, hidden, mask)[0]
    array: Floats = vector.to(torch.float64).numpy()
    return array


@contextmanager
def computing_in(body: nn.Module, dtype: str, *, probe: Callable[[], object]) -> Iterator[None]:
    """Let a float32 body compute in ``dtype``; afterwards it is float32 again, bit for bit.

    A large body is widened to float64 one layer at a time, while that layer runs, so that its weights never stand in
    memory twice. ``probe`` runs the body once: if its layers are used in another way than by calling them, all of it
    is widened at once.
    """
    if dtype == "float32":
        yield
        return
    try:
        with ExitStack() as held:
            if sum(p.nbytes for p in body.parameters()) > LARGE and _widened_by_layer(body, held, probe):
                yield
                return
            held.close()
            nn.Module.double(body)  # transformers' own refuses models that came from a quantized file
            yield
    finally:
        nn.Module.float(body)


def _widened_by_layer(body: nn.Module, held: ExitStack, probe: Callable[[], object]) -> bool:
    layers = _layers(body)
    inside = {module for layer in layers for module in layer.modules()}
    for module in body.modules():
        if module not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    for layer in layers:
        held.callback(layer.register_forward_pre_hook(_widen).remove)
        held.callback(layer.register_forward_hook(_narrow).remove)
    try:
        probe()
    except Unavailable:
        return False
    return True


def _widen(layer: nn.Module, _: object) -> None:
    layer.double()


def _narrow(layer: nn.Module, *_: object) -> None:
    layer.float()


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: what transformers stacks."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]
