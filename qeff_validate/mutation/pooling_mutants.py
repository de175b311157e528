# SPDX-License-Identifier: Apache-2.0
"""Mutants of an embedding's pooling, and of what a session with ``output`` is fed and gives.

Faults of values, rows and numbers act on every output; a batch of one row has no neighbour, and a single batch none
before it, so some of them change nothing there. No mutant needs to know which pooling was asked for: the one in its
stead is sometimes the same, and the rule for equivalent mutants says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeff_validate.models.embedding.pooling import POOLINGS
from qeff_validate.mutation.mutant import FaultySession, Inapplicable, Mutant, session_of
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array

Pool = Callable[[Tensor, Tensor], Tensor]
Numbers: TypeAlias = NDArray[Any]
Out = Callable[[FaultySession, Numbers], Any]

LONG = 40
"""Tokens beyond which a row is long: more than upstream's tests ever had."""


# --- pooling: hidden states and mask to vectors ----------------------------------------------------


def _total(hidden: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1) > 0, hidden, 0.0).sum(1)


def _mean(hidden: Tensor, mask: Tensor, more: int = 0) -> Tensor:
    return _total(hidden, mask) / (mask.sum(1, keepdim=True).clamp(min=1) + more)


def _places(mask: Tensor) -> Tensor:
    """Return 1, 2, 3, … for the real tokens of each row, wherever padding stands; 0 for padding."""
    return mask.cumsum(1) * mask


def _without_first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden, (_places(mask) > 1).to(mask.dtype))


def _without_last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden, (_places(mask) < mask.sum(1, keepdim=True)).to(mask.dtype) * mask)


def _at_most(limit: int) -> Pool:
    return lambda hidden, mask: _mean(hidden, (_places(mask) <= limit).to(mask.dtype) * mask)


def _row_0(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden[:1].expand_as(hidden), mask)


# --- feeds -----------------------------------------------------------------------------------------


def _masked(change: Callable[[Numbers], Any]) -> Callable[[Session], FaultySession]:
    """Return a fault of the mask; the change gets a copy."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        mask = feeds["attention_mask"]
        return {**feeds, "attention_mask": change(mask.copy()).astype(mask.dtype)}

    return session_of(feed)


def _identified(change: Callable[[Numbers, Numbers], Any]) -> Callable[[Session], FaultySession]:
    """Return a fault of the token ids; the change gets a copy of them, and the mask."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        ids = feeds["input_ids"]
        return {**feeds, "input_ids": change(ids.copy(), feeds["attention_mask"]).astype(ids.dtype)}

    return session_of(feed)


def _place(mask: Numbers) -> Numbers:
    return np.asarray(np.cumsum(mask, axis=1) * mask)


def _count_padding(mask: Numbers) -> Numbers:
    padded = (mask.min(axis=1) == 0) & (mask.max(axis=1) > 0)
    mask[padded, mask.argmin(axis=1)[padded]] = 1
    return mask


def _drop_first(mask: Numbers) -> Any:
    return mask * ((_place(mask) > 1) | (mask.sum(axis=1, keepdims=True) < 2))


def _swap_tokens(ids: Numbers, mask: Numbers) -> Numbers:
    """Exchange the second and the third token of each row that has four."""
    places = _place(mask)
    for row in np.flatnonzero(mask.sum(axis=1) > 3):
        second, third = (int(np.flatnonzero(places[row] == place)[0]) for place in (2, 3))
        ids[row, [second, third]] = ids[row, [third, second]]
    return ids


def _types(session: Session) -> FaultySession:
    if all(spec.name != "token_type_ids" for spec in session.inputs):
        raise Inapplicable("the graph has no input token_type_ids")
    return FaultySession(session, lambda _, feeds: {**feeds, "token_type_ids": np.ones_like(feeds["token_type_ids"])})


# --- outputs ---------------------------------------------------------------------------------------


def _served(change: Out) -> Callable[[Session], FaultySession]:
    """Return a fault of outputs; the change gets the session and a copy of each output."""

    def out(damaged: FaultySession, outputs: dict[str, Array]) -> Mapping[str, Array]:
        return {name: np.asarray(change(damaged, array)).astype(array.dtype) for name, array in outputs.items()}

    return session_of(out=out)


def _before(every: int) -> Callable[[Session], FaultySession]:
    """Return a fault that answers a run with the healthy outputs of the one before it, if their shapes agree."""

    def out(damaged: FaultySession, outputs: dict[str, Array]) -> Mapping[str, Array]:
        stale = damaged.runs % every == every - 1

        def old(name: str) -> bool:
            return stale and name in damaged.last and damaged.last[name].shape == outputs[name].shape

        return {name: damaged.last[name].copy() if old(name) else array for name, array in outputs.items()}

    return session_of(out=out)


def _rms(array: Numbers) -> Any:
    return np.sqrt(np.mean(np.square(array, dtype=np.float64), axis=-1, keepdims=True))


def _length(array: Numbers, order: int) -> Any:
    length = np.linalg.norm(array.astype(np.float64), ord=order, axis=-1, keepdims=True)
    return np.where(length > 0, length, 1.0)


def _random(damaged: FaultySession, array: Numbers) -> Any:
    return np.random.default_rng(damaged.runs).standard_normal(array.shape)


def _first_row(value: float) -> Out:
    def change(_: FaultySession, array: Numbers) -> Numbers:
        array[0] = value
        return array

    return change


def _neighbour(_: FaultySession, array: Numbers) -> Numbers:
    array[1:2] = array[:1] if len(array) > 1 else array[1:2]
    return array


def _one_element(place: int, change: Callable[[Numbers, Any], Any]) -> Out:
    """Return a fault of one element of each vector; the change gets these elements, and the rms of the vectors."""

    def out(_: FaultySession, array: Numbers) -> Numbers:
        at = place % array.shape[-1]
        array[..., at] = change(array[..., at], _rms(array)[..., 0])
        return array

    return out


def _long_rows(damaged: FaultySession, array: Numbers) -> Numbers:
    array[damaged.feeds["attention_mask"].sum(axis=1) > LONG] = 0
    return array


def _clipped(_: FaultySession, array: Numbers) -> Any:
    limit = np.nanquantile(np.abs(array), 0.99)
    return np.clip(array, -limit, limit)


def _to_bfloat16(_: FaultySession, array: Numbers) -> Numbers:
    return np.asarray(torch.from_numpy(array).bfloat16().to(torch.float32).numpy())


# --- the table -------------------------------------------------------------------------------------

_HOLES, _LIST = "upstream §5", "validation-methods §12.6"
_SESSION, _POOL, _FAULTS = "upstream §2.1", "upstream §2.2", "tests/meta/test_faults.py"


def _pool(name: str, change: Pool, source: str = _FAULTS, *, gross: bool = False, ceiling: bool = False) -> Mutant:
    return Mutant(name, "pooling", "pooling", change, source, gross=gross, ceiling=ceiling)


def _session(
    name: str,
    family: str,
    change: Callable[[Session], FaultySession],
    source: str,
    gross: bool = False,
    ceiling: bool = False,
) -> Mutant:
    return Mutant(name, family, "session", change, source, gross=gross, ceiling=ceiling)


def _out(name: str, family: str, change: Out, source: str, *, gross: bool = False, ceiling: bool = False) -> Mutant:
    return _session(name, family, _served(change), source, gross, ceiling)


VECTORS: tuple[Mutant, ...] = (
    _pool("pooled by cls", POOLINGS["cls"], _LIST),
    _pool("pooled by mean", POOLINGS["mean"], _LIST),
    _pool("pooled by max", POOLINGS["max"]),
    _pool("pooled by last", POOLINGS["last"]),
    _pool("pooled by weighted mean", POOLINGS["weighted_mean"]),
    _pool("mask ignored in pooling", lambda hidden, mask: hidden.mean(1), _LIST, ceiling=True),  # noqa: ARG005
    _pool("mean over n + 1", lambda hidden, mask: _mean(hidden, mask, 1)),
    _pool("sum in the stead of mean", _total),
    _pool("mean without the first token", _without_first),
    _pool("mean without the last token", _without_last, _LIST),
    _pool("pooling cut at 30 tokens", _at_most(30)),
    _pool("all rows pooled from row 0", _row_0, _POOL, gross=True, ceiling=True),
    _session("mask ignored", "masks", _masked(np.ones_like), "upstream §6", ceiling=True),
    _session("cut at 16 tokens", "masks", _masked(lambda mask: mask * (_place(mask) <= 16)), _SESSION, True, True),
    _session("one padding token counted as text", "masks", _masked(_count_padding), _SESSION),
    _session("first token dropped", "tokens", _masked(_drop_first), _LIST),
    _session("token ids one too low", "tokens", _identified(lambda ids, mask: np.maximum(ids - mask, 0)), _HOLES, True),
    _session("two tokens swapped", "tokens", _identified(_swap_tokens), _LIST),
    _session("token types 1", "tokens", _types, _LIST),
    _out("rows rolled", "rows", lambda _, array: np.roll(array, 1, axis=0), _LIST, gross=True, ceiling=True),
    _out("first row of each batch zero", "rows", _first_row(0.0), _LIST, gross=True, ceiling=True),
    _out("first row of each batch NaN", "rows", _first_row(float("nan")), _LIST, gross=True),
    _out("first row given to its neighbour", "rows", _neighbour, "upstream §6", gross=True),
    _out("rows beyond 40 tokens zero", "rows", _long_rows, _FAULTS),
    _out("first batch all zeros", "rows", lambda damaged, array: array * (damaged.runs > 0), _HOLES, gross=True),
    _session("answers of the run before", "rows", _before(1), _SESSION, True),
    _session("every other batch answers the one before", "rows", _before(2), _SESSION),
    _out("a random buffer", "values", _random, _SESSION, gross=True),
    _out("dims rolled", "values", lambda _, array: np.roll(array, 1, axis=-1), _LIST, gross=True),
    _out("scaled by 1.02", "values", lambda _, array: array * 1.02, _LIST, ceiling=True),
    _out("scaled by 1.0002", "values", lambda _, array: array * 1.0002, _FAULTS, ceiling=True),
    _out("all elements + 0.001 rms", "values", lambda _, array: array + 1e-3 * _rms(array), _HOLES),
    _out("one element + 0.001 rms", "values", _one_element(9, lambda v, rms: v + 1e-3 * rms), _HOLES, ceiling=True),
    _out("sign of one element", "values", _one_element(5, lambda values, _: -values), _HOLES),
    _out("normalized", "values", lambda _, array: array / _length(array, 2), _LIST),
    _out("normalized by the sum of magnitudes", "values", lambda _, array: array / _length(array, 1), _LIST),
    _out("clipped at the 99th percentile", "numbers", _clipped, _LIST),
    _out("outputs rounded to fp16", "numbers", lambda _, array: array.astype(np.float16), _FAULTS),
    _out("outputs rounded to bf16", "numbers", _to_bfloat16, "upstream §6"),
    _out("noise of 1 %", "numbers", lambda run, array: array * (1 + 1e-2 * _random(run, array)), _HOLES),
    _out("noise of 0.01 %", "numbers", lambda run, array: array * (1 + 1e-4 * _random(run, array)), _HOLES),
)
