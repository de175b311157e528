# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids: storage, padding into batches, and texts at the boundary of a bucket. Numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt

from qeff_validate.errors import IncomparableError
from qeff_validate.json_tensor import json_tensor, parse_json_tensor
from qeff_validate.models.task_data import TaskRows
from qeff_validate.tensors import Array, Tensors

FILLERS = (
    "the man and a woman went to see it in an old town on time with all of his new work for that day",
    "a b c d e f g h i j k l m",
    ".",
)
"""Words that are one token each in most tokenizers; boundary rows are built from them."""

TYPES, GROUPS, ATTENDED, SCORED = "inputs.types", "inputs.groups", "inputs.attended", "inputs.scored"
"""Names of stored tensors that not every kind has."""

EMPTY_ROW = "(a row without a token)"


class RowsText(BaseModel):
    """Content of the tensor ``texts``."""

    texts: list[str]
    notes: list[str]
    pad: NonNegativeInt
    tables: dict[str, NonNegativeInt] = {}
    similarity: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"
    task: TaskRows | None = None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids of each text, without padding.

    Attributes:
        ids: int64 arrays; the last is empty when `PooledEmbedding` made the rows.
        pad: id of the padding token.
        texts: the texts, for messages.
        notes: notes for the report.
        per_token: an output has one row per token, not per text.
        tables: sizes of the body's tables of ``tokens`` and ``positions``, as far as known.
        types: token types of each row, int64, as long as ``ids``; empty: all are 0.
        groups: number of each row's group, such as the query of a pair; empty: there are no groups.
        attended: 1 for each token of a row that the mask lets the model see, else 0; empty: it sees all.
        scored: 1 for each token of a row whose vector counts, else 0; empty: all do.
        similarity: how vectors are compared (`similarity.SIMILARITIES`).
        task: what people say of these texts; None: nothing is known.
    """

    ids: tuple[Array, ...]
    pad: int
    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    per_token: bool = False
    tables: Mapping[str, int] = field(default_factory=dict)
    types: tuple[Array, ...] = ()
    groups: tuple[int, ...] = ()
    attended: tuple[Array, ...] = ()
    scored: tuple[Array, ...] = ()
    similarity: str = "cosine"
    task: TaskRows | None = None

    @property
    def attended_ids(self) -> tuple[Array, ...]:
        """The ids of each row that the model sees."""
        if not self.attended:
            return self.ids
        return tuple(ids[seen.astype(bool)] for ids, seen in zip(self.ids, self.attended, strict=True))

    @property
    def labels(self) -> Sequence[str]:
        """One label per row of an output."""
        if not self.per_token:
            return self.texts
        return [
            f"token {place} of {text}"
            for row, (text, ids) in enumerate(zip(self.texts, self.ids, strict=True))
            for place in range(ids.size)
            if not self.scored or self.scored[row][place]
        ]

    @property
    def tokenless(self) -> frozenset[int]:
        """Indices of rows of an output without a token."""
        if self.per_token:
            return frozenset()
        return frozenset(row for row, ids in enumerate(self.ids) if ids.size == 0)

    def subset(self, texts: Sequence[int]) -> TokenRows:
        """Return the rows of some texts."""
        return replace(
            self,
            ids=tuple(self.ids[text] for text in texts),
            texts=tuple(self.texts[text] for text in texts),
            types=tuple(self.types[text] for text in texts if self.types),
            attended=tuple(self.attended[text] for text in texts if self.attended),
            scored=tuple(self.scored[text] for text in texts if self.scored),
            groups=tuple(self.groups[text] for text in texts if self.groups),
            task=None,
        )

    def stored(self) -> dict[str, Array]:
        """Return the rows as arrays for a safetensors file."""
        about = {
            "texts": self.texts,
            "notes": self.notes,
            "pad": self.pad,
            "tables": dict(self.tables),
            "similarity": self.similarity,
            "task": None if self.task is None else self.task.model_dump(),
        }
        return {
            "ids": np.concatenate(self.ids).astype(np.int64),
            "lengths": np.array([ids.size for ids in self.ids], dtype=np.int64),
            "texts": json_tensor(about),
            **{
                name: np.concatenate(values).astype(np.int64)
                for name, values in ((TYPES, self.types), (ATTENDED, self.attended), (SCORED, self.scored))
                if values
            },
            **({GROUPS: np.array(self.groups, dtype=np.int64)} if self.groups else {}),
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
        types, attended, scored = (_by_token(stored, name, ids) for name in (TYPES, ATTENDED, SCORED))
        groups = _groups(stored, len(ids)) if GROUPS in stored else ()
        if about.task is not None:
            about.task.check(len(ids))
        texts, notes = tuple(about.texts), tuple(about.notes)
        return cls(
            ids, about.pad, texts, notes, per_token, about.tables, types, groups, attended, scored,
            about.similarity, about.task,
        )  # fmt: skip


def _by_token(stored: Tensors, name: str, ids: Sequence[Array]) -> tuple[Array, ...]:
    """Return the values of each row's tokens; empty if there is no such tensor."""
    if name not in stored:
        return ()
    values, total = stored[name], sum(row.size for row in ids)
    if values.dtype != np.int64 or values.shape != (total,) or not 0 <= values.min() <= values.max() < 1 << 31:
        raise IncomparableError(f"tensor {name!r} holds no number from 0 for each token, int64 [{total}]")
    return tuple(np.split(values, np.cumsum([row.size for row in ids])[:-1]))


def _groups(stored: Tensors, rows: int) -> tuple[int, ...]:
    groups = stored[GROUPS]
    if groups.dtype != np.int64 or groups.shape != (rows,):
        raise IncomparableError(f"tensor {GROUPS!r} holds no number of a group for each row, int64 [{rows}]")
    return tuple(groups.tolist())


def split_ids(stored: Tensors, rows: int, *, least: int) -> tuple[Array, ...]:
    """Return the token ids of each row from ``ids`` and ``lengths``, both int64 ``[n]``.

    Args:
        stored: tensors by name.
        rows: number of rows.
        least: minimum number of tokens of a row.

    Raises:
        IncomparableError: a tensor is missing, of another dtype or rank, or inconsistent.
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


def batches(rows: TokenRows, size: int) -> Iterator[TokenRows]:
    """Yield batches of ``size`` rows in order; the last batch may be smaller."""
    for start in range(0, len(rows.ids), size):
        yield rows.subset(range(start, min(start + size, len(rows.ids))))


def padded(
    rows: Sequence[Array],
    batch: int,
    length: int,
    *,
    pad: int,
    side: str,
    types: Sequence[Array] = (),
    attended: Sequence[Array] = (),
) -> dict[str, Array]:
    """Return ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 ``[batch, length]``.

    The last row fills up the batch, so that there is no row without a token. Without ``types`` all token types are 0,
    and without ``attended`` all tokens are under the mask.
    """
    ids = np.full((batch, length), pad, dtype=np.int64)
    mask = np.zeros((batch, length), dtype=np.int64)
    token_types = np.zeros((batch, length), dtype=np.int64)
    for place in range(batch):
        source = min(place, len(rows) - 1)
        row = rows[source]
        columns = slice(0, row.size) if side == "right" else slice(length - row.size, length)
        ids[place, columns] = row
        mask[place, columns] = attended[source] if attended else 1
        if types:
            token_types[place, columns] = types[source]
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": token_types}


def cut(output: Array, rows: Sequence[Array], *, side: str, per_token: bool) -> Array:
    """Return the outputs of the rows, without those that fill up the batch and, per token, without padding."""
    if not per_token:
        return output[: len(rows)]
    places = [slice(0, row.size) if side == "right" else slice(output.shape[1] - row.size, None) for row in rows]
    return np.concatenate([output[at, place] for at, place in enumerate(places)])


def boundary_text(tokenize: Callable[[str], list[int]], length: int) -> str | None:
    """Return a text of exactly ``length`` tokens, or None if no filler words give one."""
    for filler in FILLERS:
        words = 1
        for _ in range(8):  # each step corrects the number of words; with one token per word one step is enough
            text = " ".join(itertools.islice(itertools.cycle(filler.split()), words))
            missing = length - len(tokenize(text))
            if missing == 0:
                return text
            words = max(1, words + missing)
    return None


def packed(states: Iterable[tuple[int, Array]], dtype: str) -> Array:
    """Concatenate the hidden states ``[n, hidden]`` of rows to ``[tokens, hidden]``, in order of the rows."""
    by_row = dict(states)
    return np.concatenate([by_row[row] for row in sorted(by_row)]).astype(dtype)


def unpacked(states: Array, ids: Sequence[Array]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the index and hidden states, float64 ``[n, hidden]``, of each row with a token: the inverse of `packed`."""
    start = 0
    for row, tokens in enumerate(ids):
        if tokens.size:
            yield row, states[start : start + tokens.size].astype(np.float64)
            start += tokens.size


TOGETHER = 2048
"""Maximum number of tokens in a batch of rows of equal length."""


def together(ids: Sequence[Array], batch: int | None = None) -> Iterator[list[int]]:
    """Yield the row indices of each batch, the shortest rows first; rows without a token are left out.

    Args:
        ids: token ids of each row.
        batch: rows per batch; None: batches of rows of equal length with at most `TOGETHER` tokens.
    """
    order = sorted((row for row, tokens in enumerate(ids) if tokens.size), key=lambda row: ids[row].size)
    for length, rows in groupby(order, key=lambda row: ids[row].size if batch is None else 0):
        same, most = list(rows), batch or max(1, TOGETHER // length)
        yield from (same[at : at + most] for at in range(0, len(same), most))
