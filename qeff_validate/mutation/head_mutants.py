# SPDX-License-Identifier: Apache-2.0
"""Mutants of models with a head: of token types, of what follows the head, and of its outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qeff_validate.mutation.mutant import FaultySession, Inapplicable, Mutant, PoolingMutant, SessionMutant, session_of
from qeff_validate.tensors import Array


def _zero_types(session: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    return {**feeds, "token_type_ids": np.zeros_like(_types(feeds))}


def _swap_types(session: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    types = _types(feeds)
    return {**feeds, "token_type_ids": (1 - np.minimum(types, 1)).astype(types.dtype)}


def _types(feeds: dict[str, Array]) -> Array:
    if "token_type_ids" not in feeds:
        raise Inapplicable("the graph takes no token types")
    return feeds["token_type_ids"]


def _next_label(session: FaultySession, outputs: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    if any(array.shape[-1] < 2 for array in outputs.values()):
        raise Inapplicable("the model has one label")
    return {name: np.roll(array, 1, axis=-1) for name, array in outputs.items()}


def _next_row(session: FaultySession, outputs: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    return {name: np.roll(array, 1, axis=0) for name, array in outputs.items()}


def _first_row(session: FaultySession, outputs: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    return {name: np.broadcast_to(array[:1], array.shape).copy() for name, array in outputs.items()}


def _without_activation(logits: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001
    return logits


def _masked(weights: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1) > 0, weights, 0.0)


def _saturated(logits: Tensor) -> Tensor:
    return torch.log1p(torch.relu(logits))


def _absolute(logits: Tensor, mask: Tensor) -> Tensor:
    return _masked(torch.log1p(logits.abs()), mask).amax(1)


def _without_log(logits: Tensor, mask: Tensor) -> Tensor:
    return _masked(torch.relu(logits), mask).amax(1)


def _padding_too(logits: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001
    return _saturated(logits).amax(1)


def _sum(logits: Tensor, mask: Tensor) -> Tensor:
    return _masked(_saturated(logits), mask).sum(1)


def _first_token(logits: Tensor, mask: Tensor) -> Tensor:
    first = (mask.cumsum(1) * mask == 1).to(mask.dtype)
    return _masked(_saturated(logits), first).amax(1)


def _other_lengths(session: FaultySession, outputs: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    for array in outputs.values():
        np.multiply(array[:, ::3], 1.1, out=array[:, ::3], casting="same_kind")
    return outputs


def _next_token(session: FaultySession, outputs: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    return {name: np.roll(array, 1, axis=1) for name, array in outputs.items()}


def _last_element(session: FaultySession, outputs: dict[str, Array]) -> dict[str, Array]:  # noqa: ARG001
    for array in outputs.values():
        array[..., -1] = 0
    return outputs


_LIST = "validation-methods §12.6"

ROW_MUTANTS: tuple[Mutant, ...] = (
    SessionMutant("outputs of the next row", "rows", session_of(out=_next_row), _LIST, gross=True, ceiling=True),
    SessionMutant("every row as the first", "rows", session_of(out=_first_row), _LIST, gross=True, ceiling=True),
)
"""Mutants of any kind with one output for each row."""

SCORE_MUTANTS: tuple[Mutant, ...] = (
    *ROW_MUTANTS,
    SessionMutant("token types all 0", "token types", session_of(feed=_zero_types), _LIST, ceiling=True),
    SessionMutant("token types swapped", "token types", session_of(feed=_swap_types), _LIST),
    SessionMutant("labels moved by one", "labels", session_of(out=_next_label), _LIST, gross=True, ceiling=True),
    PoolingMutant("activation missing", "activation", _without_activation, _LIST, ceiling=True),
)

SPARSE_MUTANTS: tuple[Mutant, ...] = (
    *ROW_MUTANTS,
    PoolingMutant("|x| in place of ReLU", "activation", _absolute, _LIST, ceiling=True),
    PoolingMutant("logarithm missing", "activation", _without_log, _LIST, ceiling=True),
    PoolingMutant("padding pooled too", "pooling", _padding_too, _LIST, ceiling=True),
    PoolingMutant("sum in place of max", "pooling", _sum, _LIST, ceiling=True),
    PoolingMutant("first token alone pooled", "pooling", _first_token, _LIST, gross=True, ceiling=True),
)
"""Of SPLADE with max pooling and ReLU; of another pooling they are other faults."""

MULTI_VECTOR_MUTANTS: tuple[Mutant, ...] = (
    *ROW_MUTANTS,
    SessionMutant("vectors not of length 1", "normalization", session_of(out=_other_lengths), _LIST, ceiling=True),
    SessionMutant("vectors of the next token", "tokens", session_of(out=_next_token), _LIST, gross=True, ceiling=True),
    SessionMutant("last element zero", "projection", session_of(out=_last_element), _LIST, ceiling=True),
)
