# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids: as they are stored, padded into batches, and at the boundary of a bucket. Numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt

from qeff_validate.errors import IncomparableError
from qeff_validate.json_tensor import json_tensor, parse_json_tensor
from qeff_validate.tensors import Array, Tensors

FILLERS = (
    "the man and a woman went to see it in an old town on time with all of his new work for that day",
    "a b c d e f g h i j k l m",
    ".",
)
"""Words that most tokenizers turn into one token each; boundary rows are built from them."""

EMPTY_ROW = "(a row without a token)"


class RowsText(BaseModel):
    """What the tensor ``texts`` holds beside the token ids."""

    texts: list[str]
    notes: list[str]
    pad: NonNegativeInt
    tables: dict[str, NonNegativeInt] = {}


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids of each text, without padding.

    Attributes:
        ids: int64 arrays; the last is empty when `PooledEmbedding` made the rows.
        pad: the id of the padding token.
        texts: the texts, for messages.
        notes: what a reader of the report should know.
        per_token: an output has one row for each token, not for each text.
        tables: how many ``tokens`` and ``positions`` the body knows, where that is known.
    """

    ids: tuple[Array, ...]
    pad: int
    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    per_token: bool = False
    tables: Mapping[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> Sequence[str]:
        """One text for each row of an output."""
        if not self.per_token:
            return self.texts
        return [
            f"token {place} of {text}"
            for text, ids in zip(self.texts, self.ids, strict=True)
            for place in range(ids.size)
        ]

    @property
    def tokenless(self) -> frozenset[int]:
        """Rows of an output that hold no token."""
        if self.per_token:
            return frozenset()
        return frozenset(row for row, ids in enumerate(self.ids) if ids.size == 0)

    def subset(self, texts: Sequence[int]) -> TokenRows:
        """Return some of the texts."""
        ids, labels = tuple(self.ids[text] for text in texts), tuple(self.texts[text] for text in texts)
        return replace(self, ids=ids, texts=labels)

    def stored(self) -> dict[str, Array]:
        """Return the rows as arrays for a safetensors file."""
        about = {"texts": self.texts, "notes": self.notes, "pad": self.pad, "tables": dict(self.tables)}
        return {
            "ids": np.concatenate(self.ids).astype(np.int64),
            "lengths": np.array([ids.size for ids in self.ids], dtype=np.int64),
            "texts": json_tensor(about),
        }

    @classmethod
    def from_stored(cls, stored: Tensors, *, per_token: bool = False) -> TokenRows:
        """Return the rows that `stored` wrote.

        Raises:
            IncomparableError: a tensor is missing, of another dtype, or does not fit the others.
        """
        about = parse_json_tensor(stored, "texts", RowsText)
        ids = split_ids(stored, len(about.texts), least=0)
        if not any(row.size for row in ids):
            raise IncomparableError("tensor 'ids' is empty: no row holds a token")
        return cls(ids, about.pad, tuple(about.texts), tuple(about.notes), per_token, about.tables)


def split_ids(stored: Tensors, rows: int, *, least: int) -> tuple[Array, ...]:
    """Return the token ids of each row from ``ids`` and ``lengths``, both int64 ``[n]``.

    Args:
        stored: tensors by name.
        rows: how many there are.
        least: tokens that a row has at least.

    Raises:
        IncomparableError: they are missing, of another dtype or rank, or do not fit each other.
    """
    for name in ("ids", "lengths"):
        if name not in stored:
            raise IncomparableError(f"tensor {name!r} is missing")
        if stored[name].dtype != np.int64 or stored[name].ndim != 1:
            raise IncomparableError(
                f"tensor {name!r} is {stored[name].dtype} {list(stored[name].shape)}, wanted int64 [n]"
            )
    ids, lengths = stored["ids"], stored["lengths"].tolist()
    if len(lengths) != rows:
        raise IncomparableError(f"tensor 'lengths' has {len(lengths)} rows, tensor 'texts' has {rows}")
    if not lengths or min(lengths) < least or sum(lengths) != ids.size:
        total = sum(lengths)
        raise IncomparableError(
            f"tensor 'lengths' does not fit: its rows (at least {least} tokens each, the shortest has"
            f" {min(lengths, default=0)}) have {total} tokens, and tensor 'ids' has {ids.size}"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 31:
        raise IncomparableError(f"tensor 'ids' holds {ids.min()} to {ids.max()}: token ids are from 0 to 2147483647")
    return tuple(np.split(ids, np.cumsum(lengths)[:-1]))


def batches(ids: Sequence[Array], size: int) -> Iterator[Sequence[Array]]:
    """Yield the rows in order, so many at a time; the last batch may be smaller."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def padded(rows: Sequence[Array], batch: int, length: int, *, pad: int, side: str) -> dict[str, Array]:
    """Return ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 ``[batch, length]``.

    Places beyond the last row repeat it, so that a fixed batch holds no row without a token.
    """
    ids = np.full((batch, length), pad, dtype=np.int64)
    mask = np.zeros((batch, length), dtype=np.int64)
    for place in range(batch):
        row = rows[min(place, len(rows) - 1)]
        where = slice(0, row.size) if side == "right" else slice(length - row.size, length)
        ids[place, where] = row
        mask[place, where] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def cut(output: Array, rows: Sequence[Array], *, side: str, per_token: bool) -> Array:
    """Return what belongs to the rows: without the filled-up places and, per token, without padding."""
    if not per_token:
        return output[: len(rows)]
    places = [slice(0, row.size) if side == "right" else slice(output.shape[1] - row.size, None) for row in rows]
    return np.concatenate([output[at, place] for at, place in enumerate(places)])


def boundary_text(tokenize: Callable[[str], list[int]], prompt: str, length: int) -> str | None:
    """Return a text of exactly so many tokens, or None if no filler word gives one."""
    for filler in FILLERS:
        words = 1
        for _ in range(8):  # each step corrects the count by what is missing; one token a word converges at once
            text = " ".join(itertools.islice(itertools.cycle(filler.split()), words))
            missing = length - len(tokenize(prompt + text))
            if missing == 0:
                return text
            words = max(1, words + missing)
    return None


def packed(states: Iterable[tuple[int, Array]], dtype: str) -> Array:
    """Return the hidden states of rows ``[n, hidden]`` as ``[tokens, hidden]``, in order of the rows."""
    of = dict(states)
    return np.concatenate([of[row] for row in sorted(of)]).astype(dtype)


def unpacked(states: Array, ids: Sequence[Array]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield each row that has a token, and its hidden states in float64, from what `packed` returned."""
    start = 0
    for row, tokens in enumerate(ids):
        if tokens.size:
            yield row, states[start : start + tokens.size].astype(np.float64)
            start += tokens.size


TOGETHER = 2048
"""Tokens of rows of equal length that run together at most."""


def together(ids: Sequence[Array], batch: int | None = None) -> Iterator[list[int]]:
    """Yield which rows run together, the shortest first; those without a token do not.

    Args:
        ids: token ids of each row.
        batch: so many rows; None: as many of equal length as `TOGETHER` allows.
    """
    order = sorted((row for row, tokens in enumerate(ids) if tokens.size), key=lambda row: ids[row].size)
    for length, rows in groupby(order, key=lambda row: ids[row].size if batch is None else 0):
        same, most = list(rows), batch or max(1, TOGETHER // length)
        yield from (same[at : at + most] for at in range(0, len(same), most))
