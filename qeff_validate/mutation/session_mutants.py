# SPDX-License-Identifier: Apache-2.0
"""Mutants of a session with an embedding model: faults of its token ids, masks and vectors.

Faults of rows, values and numbers act on every output. A batch of one row has no neighbour and the first batch has none
before it, so some faults change nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from qeff_validate.mutation.mutant import FaultySession, Inapplicable, SessionMutant, session_of
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array

Numbers: TypeAlias = NDArray[Any]
Out = Callable[[FaultySession, Numbers], Any]

LONG = 40
"""Tokens beyond which a row is long: more than upstream's tests ever had."""


# --- inputs ----------------------------------------------------------------------------------------


def _of_mask(change: Callable[[Numbers], Any]) -> Callable[[Session], FaultySession]:
    """Return a fault of the attention mask ``[batch, seq]``; the change takes a copy."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        mask = feeds["attention_mask"]
        return {**feeds, "attention_mask": change(mask.copy()).astype(mask.dtype)}

    return session_of(feed)


def _of_token_ids(change: Callable[[Numbers, Numbers], Any]) -> Callable[[Session], FaultySession]:
    """Return a fault of the token ids ``[batch, seq]``; the change takes a copy of them and the mask."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        ids = feeds["input_ids"]
        return {**feeds, "input_ids": change(ids.copy(), feeds["attention_mask"]).astype(ids.dtype)}

    return session_of(feed)


def _token_numbers(mask: Numbers) -> Numbers:
    """Number the tokens of each row from 1; 0 for padding."""
    return np.asarray(np.cumsum(mask, axis=1) * mask)


def _cut_at_16(mask: Numbers) -> Numbers:
    return np.asarray(mask * (_token_numbers(mask) <= 16))


def _count_padding(mask: Numbers) -> Numbers:
    padded = (mask.min(axis=1) == 0) & (mask.max(axis=1) > 0)
    mask[padded, mask.argmin(axis=1)[padded]] = 1
    return mask


def _drop_first(mask: Numbers) -> Any:
    return mask * ((_token_numbers(mask) > 1) | (mask.sum(axis=1, keepdims=True) < 2))


def _lower_ids(ids: Numbers, mask: Numbers) -> Numbers:
    return np.asarray(np.maximum(ids - mask, 0))


def _swap_tokens(ids: Numbers, mask: Numbers) -> Numbers:
    """Exchange the second and the third token of each row that has four."""
    numbers = _token_numbers(mask)
    for row in np.flatnonzero(mask.sum(axis=1) > 3):
        second, third = (int(np.flatnonzero(numbers[row] == number)[0]) for number in (2, 3))
        ids[row, [second, third]] = ids[row, [third, second]]
    return ids


def _token_types_one(session: Session) -> FaultySession:
    if all(spec.name != "token_type_ids" for spec in session.inputs):
        raise Inapplicable("the graph has no input token_type_ids")
    return FaultySession(session, lambda _, feeds: {**feeds, "token_type_ids": np.ones_like(feeds["token_type_ids"])})


# --- outputs ---------------------------------------------------------------------------------------


def _of_outputs(change: Out) -> Callable[[Session], FaultySession]:
    """Return a fault of the outputs; the change takes the session and a copy of each output."""

    def out(session: FaultySession, outputs: dict[str, Array]) -> Mapping[str, Array]:
        return {name: np.asarray(change(session, array)).astype(array.dtype) for name, array in outputs.items()}

    return session_of(out=out)


def _stale(every: int) -> Callable[[Session], FaultySession]:
    """Return a fault: every n-th run gives the healthy outputs of the run before it, if their shapes agree."""

    def out(session: FaultySession, outputs: dict[str, Array]) -> Mapping[str, Array]:
        is_stale = session.runs % every == every - 1

        def replaced(name: str) -> bool:
            return is_stale and name in session.last and session.last[name].shape == outputs[name].shape

        return {name: session.last[name].copy() if replaced(name) else array for name, array in outputs.items()}

    return session_of(out=out)


def _rms(array: Numbers) -> Any:
    return np.sqrt(np.mean(np.square(array, dtype=np.float64), axis=-1, keepdims=True))


def _norm(array: Numbers, order: int) -> Any:
    norm = np.linalg.norm(array.astype(np.float64), ord=order, axis=-1, keepdims=True)
    return np.where(norm > 0, norm, 1.0)


def _random(session: FaultySession, array: Numbers) -> Any:
    return np.random.default_rng(session.runs).standard_normal(array.shape)


def _first_row(value: float) -> Out:
    def change(_: FaultySession, array: Numbers) -> Numbers:
        array[0] = value
        return array

    return change


def _neighbour(_: FaultySession, array: Numbers) -> Numbers:
    array[1:2] = array[:1] if len(array) > 1 else array[1:2]
    return array


def _one_element(position: int, change: Callable[[Numbers, Any], Any]) -> Out:
    """Return a fault of one element of each vector; the change takes these elements and the rms of the vectors."""

    def out(_: FaultySession, array: Numbers) -> Numbers:
        index = position % array.shape[-1]
        array[..., index] = change(array[..., index], _rms(array)[..., 0])
        return array

    return out


def _long_rows(session: FaultySession, array: Numbers) -> Numbers:
    array[session.feeds["attention_mask"].sum(axis=1) > LONG] = 0
    return array


def _clipped(_: FaultySession, array: Numbers) -> Any:
    limit = np.nanquantile(np.abs(array), 0.99)
    return np.clip(array, -limit, limit)


def _to_bfloat16(_: FaultySession, array: Numbers) -> Numbers:
    return np.asarray(torch.from_numpy(array).bfloat16().to(torch.float32).numpy())


# --- the table -------------------------------------------------------------------------------------

_HOLES, _LIST = "upstream §5", "validation-methods §12.6"
_SESSION, _FAULTS = "upstream §2.1", "tests/meta/test_faults.py"


def _out(
    name: str, family: str, change: Out, source: str, *, gross: bool = False, ceiling: bool = False
) -> SessionMutant:
    return SessionMutant(name, family, _of_outputs(change), source, gross, ceiling)


SESSION_MUTANTS: tuple[SessionMutant, ...] = (
    SessionMutant("mask ignored", "masks", _of_mask(np.ones_like), "upstream §6", ceiling=True),
    SessionMutant("cut at 16 tokens", "masks", _of_mask(_cut_at_16), _SESSION, True, True),
    SessionMutant("one padding token counted as text", "masks", _of_mask(_count_padding), _SESSION),
    SessionMutant("first token dropped", "tokens", _of_mask(_drop_first), _LIST),
    SessionMutant("token ids one too low", "tokens", _of_token_ids(_lower_ids), _HOLES, True),
    SessionMutant("two tokens swapped", "tokens", _of_token_ids(_swap_tokens), _LIST),
    SessionMutant("token types 1", "tokens", _token_types_one, _LIST),
    _out("rows rolled", "rows", lambda _, array: np.roll(array, 1, axis=0), _LIST, gross=True, ceiling=True),
    _out("first row of each batch zero", "rows", _first_row(0.0), _LIST, gross=True, ceiling=True),
    _out("first row of each batch NaN", "rows", _first_row(float("nan")), _LIST, gross=True),
    _out("first row given to its neighbour", "rows", _neighbour, "upstream §6", gross=True),
    _out("rows beyond 40 tokens zero", "rows", _long_rows, _FAULTS),
    _out("first batch all zeros", "rows", lambda session, array: array * (session.runs > 0), _HOLES, gross=True),
    SessionMutant("answers of the run before", "rows", _stale(1), _SESSION, True),
    SessionMutant("every other batch answers the one before", "rows", _stale(2), _SESSION),
    _out("a random buffer", "values", _random, _SESSION, gross=True),
    _out("dims rolled", "values", lambda _, array: np.roll(array, 1, axis=-1), _LIST, gross=True),
    _out("scaled by 1.02", "values", lambda _, array: array * 1.02, _LIST, ceiling=True),
    _out("scaled by 1.0002", "values", lambda _, array: array * 1.0002, _FAULTS, ceiling=True),
    _out("all elements + 0.001 rms", "values", lambda _, array: array + 1e-3 * _rms(array), _HOLES),
    _out(
        "one element + 0.001 rms",
        "values",
        _one_element(9, lambda x, rms: x + 1e-3 * rms),
        _HOLES,
        ceiling=True,
    ),
    _out("sign of one element", "values", _one_element(5, lambda values, _: -values), _HOLES),
    _out("normalized", "values", lambda _, array: array / _norm(array, 2), _LIST),
    _out("normalized by the sum of magnitudes", "values", lambda _, array: array / _norm(array, 1), _LIST),
    _out("clipped at the 99th percentile", "numbers", _clipped, _LIST),
    _out("outputs rounded to fp16", "numbers", lambda _, array: array.astype(np.float16), _FAULTS),
    _out("outputs rounded to bf16", "numbers", _to_bfloat16, "upstream §6"),
    _out("noise of 1 %", "numbers", lambda session, array: array * (1 + 1e-2 * _random(session, array)), _HOLES),
    _out("noise of 0.01 %", "numbers", lambda session, array: array * (1 + 1e-4 * _random(session, array)), _HOLES),
)
