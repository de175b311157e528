# SPDX-License-Identifier: Apache-2.0
"""Relations that must hold between runs of one session, whatever the right answer is. No reference is needed.

Each relation takes the wrapper, an open session and the rows, and returns what two ways of running the same rows
gave, with a label for each row: ``(expected, actual, labels)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.errors import IncomparableError
from qeff_validate.models.token_rows import TokenRows, batches, cut, padded
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors

Pair = tuple[Tensors, Tensors, Sequence[str]]
Relation = Callable[[Any, Session, TokenRows], Pair]

ALONE = 8
"""Rows that are run one by one."""

SIDE_FREE = 1e-4
"""Relative L2 of a body in float32 under left padding: rounding gives 1e-6, moved positions 1e-2 and more."""


def subset(rows: TokenRows, picked: Sequence[int]) -> TokenRows:
    """Return some of the rows, in the given order."""
    return replace(rows, ids=tuple(rows.ids[p] for p in picked), texts=tuple(rows.texts[p] for p in picked))


def permutation(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Rows in another order, so with other neighbours and other padding, give the same vectors."""
    order = np.random.default_rng(0).permutation(len(rows.ids))
    back = np.argsort(order)
    texts = replace(rows, per_token=False)
    moved = model.infer(session, subset(texts, order.tolist()))
    return model.infer(session, texts), {name: array[back] for name, array in moved.items()}, rows.texts


def single_row(model: Any, session: Session, rows: TokenRows) -> Pair:
    """A row by itself gives what it gives in a batch; shortest, longest and some between."""
    by_length = np.argsort([ids.size for ids in rows.ids], kind="stable")
    picked = by_length[np.linspace(0, len(by_length) - 1, min(ALONE, len(by_length))).astype(int)].tolist()
    together = model.infer(session, rows)
    alone = [model.infer(session, subset(rows, [row])) for row in picked]
    return (
        {name: array[picked] for name, array in together.items()},
        {name: np.concatenate([one[name] for one in alone]) for name in together},
        [rows.texts[row] for row in picked],
    )


def greater_bucket(model: Any, session: Session, rows: TokenRows) -> Pair:
    """A row padded to any greater length, boundary rows among them, gives the same vector."""
    lengths = sorted({length for _, length in _shapes(model, session)})
    expected: dict[str, list[Array]] = {}
    actual: dict[str, list[Array]] = {}
    labels: list[str] = []
    base = model.infer(session, rows)
    for length in lengths:
        picked = [row for row, ids in enumerate(rows.ids) if ids.size <= length]
        found = _run_at(model, session, subset(rows, picked), length)
        for name, array in found.items():
            expected.setdefault(name, []).append(base[name][picked])
            actual.setdefault(name, []).append(array)
        labels += [f"{rows.texts[row]} [in {length}]" for row in picked]
    return _joined(expected), _joined(actual), labels


def garbage_in_padding(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Whatever ids stand in masked positions, the vectors are the same."""
    length = max(length for _, length in _shapes(model, session))
    clean = _run_at(model, session, rows, length)
    return clean, _run_at(model, session, rows, length, garbage=True), rows.texts


def duplicates(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Equal rows give equal vectors, wherever they stand."""
    picked = list(range(len(rows.ids)))
    twice = model.infer(session, subset(rows, [*picked, *picked[::-1]]))
    n = len(picked)
    first = {name: array[:n] for name, array in twice.items()}
    return first, {name: array[n:][::-1] for name, array in twice.items()}, rows.texts


def padding_sides(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Padding before a row gives what padding behind it gives, in each bucket.

    Raises:
        IncomparableError: the Hugging Face body itself gives something else, as with learned absolute positions.
    """
    from qeff_validate.models.embedding.reference import left_padding_shift

    shift = left_padding_shift(model.source.body(), rows.ids, rows.pad)
    if not shift <= SIDE_FREE:
        raise IncomparableError(
            f"padding before a row changes what the Hugging Face body itself returns (relative L2 {shift:.1e}):"
            " its positions count from the first column"
        )
    sides: dict[str, dict[str, list[Array]]] = {"right": {}, "left": {}}
    labels: list[str] = []
    for length in sorted({length for _, length in _shapes(model, session)}):
        picked = [row for row, ids in enumerate(rows.ids) if ids.size <= length]
        for side, parts in sides.items():
            for name, array in _run_at(model, session, subset(rows, picked), length, side=side).items():
                parts.setdefault(name, []).append(array)
        labels += [f"{rows.texts[row]} [in {length}]" for row in picked]
    return _joined(sides["right"]), _joined(sides["left"]), labels


RELATIONS: Mapping[str, Relation] = {
    "duplicates": duplicates,
    "garbage_in_padding": garbage_in_padding,
    "greater_bucket": greater_bucket,
    "padding_sides": padding_sides,
    "permutation": permutation,
    "single_row": single_row,
}


def with_tokens(rows: TokenRows) -> TokenRows:
    """Return the rows that hold a token; relations are about these.

    Raises:
        IncomparableError: outputs are per token, and relations compare whole texts.
    """
    if rows.per_token:
        raise IncomparableError("metamorphic relations compare one vector a text; pooling none has one a token")
    return subset(rows, [row for row, ids in enumerate(rows.ids) if ids.size])


def _shapes(model: Any, session: Session) -> list[tuple[int, int]]:
    if session.shapes:
        return [(shapes["input_ids"][0], shapes["input_ids"][1]) for shapes in session.shapes]
    return [(model.options.batch_size, length) for length in model.options.seq_len]


def _run_at(
    model: Any, session: Session, rows: TokenRows, length: int, *, garbage: bool = False, side: str | None = None
) -> dict[str, Array]:
    """Run rows padded to one length, with other tokens in the masked positions if asked, on the case's side if none."""
    batch = max(size for size, at in _shapes(model, session) if at == length)
    side, dtypes = side or model.options.padding_side, {spec.name: spec.dtype for spec in session.inputs}
    words = np.unique(np.concatenate(rows.ids))
    generator = np.random.default_rng(1)
    parts: dict[str, list[Array]] = {}
    for part in batches(rows.ids, batch):
        known = padded(part, batch, length, pad=rows.pad, side=side)
        if garbage:
            ids = known["input_ids"]
            known["input_ids"] = np.where(known["attention_mask"].astype(bool), ids, generator.choice(words, ids.shape))
        feeds = {name: known[name].astype(dtype, copy=False) for name, dtype in dtypes.items() if name in known}
        for name, array in session.run(feeds).items():
            parts.setdefault(name, []).append(cut(array, part, side=side, per_token=False))
    return _joined(parts)


def _joined(parts: Mapping[str, list[Array]]) -> dict[str, Array]:
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
