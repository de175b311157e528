# SPDX-License-Identifier: Apache-2.0
"""Mutants of an embedding's pooling: other poolings, and common errors in one.

No mutant depends on the pooling of the case. A mutant may be the very pooling of the case; the rule for equivalent
mutants finds that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qeff_validate.models.embedding.pooling import POOLINGS
from qeff_validate.mutation.mutant import PoolingMutant

Pool = Callable[[Tensor, Tensor], Tensor]


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1) > 0, hidden, 0.0).sum(1)


def _mean(hidden: Tensor, mask: Tensor, extra: int = 0) -> Tensor:
    return _sum(hidden, mask) / (mask.sum(1, keepdim=True).clamp(min=1) + extra)


def _numbers(mask: Tensor) -> Tensor:
    """Number the tokens of each row from 1, wherever its padding is; 0 for padding."""
    return mask.cumsum(1) * mask


def _without_first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden, (_numbers(mask) > 1).to(mask.dtype))


def _without_last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden, (_numbers(mask) < mask.sum(1, keepdim=True)).to(mask.dtype) * mask)


def _at_most(limit: int) -> Pool:
    return lambda hidden, mask: _mean(hidden, (_numbers(mask) <= limit).to(mask.dtype) * mask)


def _row_0(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden[:1].expand_as(hidden), mask)


_LIST, _POOL, _FAULTS = "validation-methods §12.6", "upstream §2.2", "tests/meta/test_faults.py"


def _pool(
    name: str, change: Pool, source: str = _FAULTS, *, gross: bool = False, ceiling: bool = False
) -> PoolingMutant:
    return PoolingMutant(name, "pooling", change, source, gross=gross, ceiling=ceiling)


POOLING_MUTANTS: tuple[PoolingMutant, ...] = (
    _pool("pooled by cls", POOLINGS["cls"], _LIST),
    _pool("pooled by mean", POOLINGS["mean"], _LIST),
    _pool("pooled by max", POOLINGS["max"]),
    _pool("pooled by last", POOLINGS["last"]),
    _pool("pooled by weighted mean", POOLINGS["weighted_mean"]),
    _pool("mask ignored in pooling", lambda hidden, mask: hidden.mean(1), _LIST, ceiling=True),  # noqa: ARG005
    _pool("mean over n + 1", lambda hidden, mask: _mean(hidden, mask, 1)),
    _pool("sum in place of mean", _sum),
    _pool("mean without the first token", _without_first),
    _pool("mean without the last token", _without_last, _LIST),
    _pool("pooling cut at 30 tokens", _at_most(30)),
    _pool("all rows pooled from row 0", _row_0, _POOL, gross=True, ceiling=True),
)
