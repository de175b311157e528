# SPDX-License-Identifier: Apache-2.0
"""Metamorphic relations between runs of one session. No reference is needed.

Each relation takes the model wrapper, an open session and the rows, runs the same rows in two ways, and returns both
outputs with a label for each row: ``(expected, actual, labels)``.
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

SINGLE_ROWS = 8
"""Maximum number of rows that are run one by one."""


def permutation(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Rows in another order, hence in other batches with other padding, give the same vectors."""
    order = np.random.default_rng(0).permutation(len(rows.ids))
    back = np.argsort(order)
    texts = replace(rows, per_token=False)
    moved = model.infer(session, texts.subset(order.tolist()))
    return model.infer(session, texts), {name: array[back] for name, array in moved.items()}, rows.texts


def single_row(model: Any, session: Session, rows: TokenRows) -> Pair:
    """A single row gives the same vector as in a batch; the shortest, the longest and some between."""
    by_length = np.argsort([ids.size for ids in rows.ids], kind="stable")
    indices = by_length[np.linspace(0, len(by_length) - 1, min(SINGLE_ROWS, len(by_length))).astype(int)].tolist()
    together = model.infer(session, rows)
    alone = [model.infer(session, rows.subset([row])) for row in indices]
    return (
        {name: array[indices] for name, array in together.items()},
        {name: np.concatenate([outputs[name] for outputs in alone]) for name in together},
        [rows.texts[row] for row in indices],
    )


def greater_bucket(model: Any, session: Session, rows: TokenRows) -> Pair:
    """A row padded to any greater bucket gives the same vector, boundary rows included."""
    lengths = sorted({length for _, length in shapes(model, session)})
    expected: dict[str, list[Array]] = {}
    actual: dict[str, list[Array]] = {}
    labels: list[str] = []
    base = model.infer(session, rows)
    for length in lengths:
        indices = [row for row, ids in enumerate(rows.ids) if ids.size <= length]
        outputs = run_at(model, session, rows.subset(indices), length)
        for name, array in outputs.items():
            expected.setdefault(name, []).append(base[name][indices])
            actual.setdefault(name, []).append(array)
        labels += [f"{rows.texts[row]} [in {length}]" for row in indices]
    return joined(expected), joined(actual), labels


def garbage_in_padding(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Random ids in masked positions give the same vectors."""
    length = max(length for _, length in shapes(model, session))
    clean = run_at(model, session, rows, length)
    return clean, run_at(model, session, rows, length, garbage=True), rows.texts


def duplicates(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Equal rows give equal vectors at every position of a batch."""
    indices = list(range(len(rows.ids)))
    twice = model.infer(session, rows.subset([*indices, *indices[::-1]]))
    n = len(indices)
    first = {name: array[:n] for name, array in twice.items()}
    return first, {name: array[n:][::-1] for name, array in twice.items()}, rows.texts


RELATIONS: Mapping[str, Relation] = {
    "duplicates": duplicates,
    "garbage_in_padding": garbage_in_padding,
    "greater_bucket": greater_bucket,
    "permutation": permutation,
    "single_row": single_row,
}


def with_tokens(rows: TokenRows) -> TokenRows:
    """Return the rows with at least one token, which relations are defined for.

    Raises:
        IncomparableError: outputs are per token, and relations compare whole texts.
    """
    if rows.per_token:
        raise IncomparableError("metamorphic relations compare one vector a text; pooling none has one a token")
    return rows.subset([row for row, ids in enumerate(rows.ids) if ids.size])


def shapes(model: Any, session: Session) -> list[tuple[int, int]]:
    """Return rows and tokens of each allowed shape; those of the case where a session allows any."""
    if session.shapes:
        return [(allowed["input_ids"][0], allowed["input_ids"][1]) for allowed in session.shapes]
    return [(model.options.batch_size, length) for length in model.options.seq_len]


def run_at(
    model: Any, session: Session, rows: TokenRows, length: int, *, garbage: bool = False, side: str | None = None
) -> dict[str, Array]:
    """Run rows padded to one length; random ids in masked positions if ``garbage``; ``side`` None: that of the case."""
    batch = max(size for size, at in shapes(model, session) if at == length)
    side, dtypes = side or model.options.padding_side, {spec.name: spec.dtype for spec in session.inputs}
    words = np.unique(np.concatenate(rows.ids))
    generator = np.random.default_rng(1)
    parts: dict[str, list[Array]] = {}
    for part in batches(rows, batch):
        known = padded(part.ids, batch, length, pad=rows.pad, side=side, types=part.types, attended=part.attended)
        if garbage:
            ids = known["input_ids"]
            known["input_ids"] = np.where(known["attention_mask"].astype(bool), ids, generator.choice(words, ids.shape))
        feeds = {name: known[name].astype(dtype, copy=False) for name, dtype in dtypes.items() if name in known}
        for name, array in session.run(feeds).items():
            parts.setdefault(name, []).append(cut(array, part.ids, side=side, per_token=False))
    return joined(parts)


def joined(parts: Mapping[str, list[Array]]) -> dict[str, Array]:
    """Concatenate the parts of each output."""
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
