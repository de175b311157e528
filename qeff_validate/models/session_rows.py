# SPDX-License-Identifier: Apache-2.0
"""Runs rows of token ids on a session: in batches, each padded to the smallest allowed shape. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qeff_validate.errors import RunError
from qeff_validate.models.token_rows import TokenRows, batches, cut, padded
from qeff_validate.protocols import Session, Workload
from qeff_validate.tensors import Array, Tensors


def run_rows(session: Session, rows: TokenRows, *, batch_size: int, side: str) -> Tensors:
    """Run all rows, and return each output in the order of the rows, without padding.

    Args:
        session: open.
        rows: the rows; with ``per_token`` an output has one row per token.
        batch_size: rows per batch where the session allows any number.
        side: where padding stands, ``right`` or ``left``.

    Raises:
        RunError: no allowed shape of the session fits, or an output has lost its rows.
    """
    parts: dict[str, list[Array]] = {}
    dtypes = {spec.name: spec.dtype for spec in session.inputs}
    for part in batches(rows, largest_batch(session, batch_size)):
        batch, length = smallest_shape(session, part.ids)
        known = padded(part.ids, batch, length, pad=rows.pad, side=side, types=part.types, attended=part.attended)
        feeds = {name: known[name].astype(dtype, copy=False) for name, dtype in dtypes.items() if name in known}
        for name, array in session.run(feeds).items():
            if array.ndim < 2 or len(array) != batch:
                raise RunError(f"output {name!r} has shape {list(array.shape)}, wanted {batch} rows of vectors")
            if rows.per_token and array.shape[1] != length:
                raise RunError(f"output {name!r} has shape {list(array.shape)}, wanted {length} tokens a row")
            parts.setdefault(name, []).append(cut(array, part.ids, side=side, per_token=rows.per_token))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def largest_batch(session: Session, batch_size: int) -> int:
    """Return the rows of the session's largest batch; ``batch_size`` where it allows any number."""
    sizes = [shapes["input_ids"][0] for shapes in session.shapes]
    return max(sizes) if sizes else batch_size


def smallest_shape(session: Session, ids: Sequence[Array]) -> tuple[int, int]:
    """Return rows and tokens of the smallest allowed shape that holds some rows.

    Raises:
        RunError: none does.
    """
    longest = max(1, *(row.size for row in ids))
    if not session.shapes:
        return len(ids), longest
    allowed = [(shapes["input_ids"][0], shapes["input_ids"][1]) for shapes in session.shapes]
    fitting = [(batch, length) for batch, length in allowed if batch >= len(ids) and length >= longest]
    if not fitting:
        raise RunError(f"no allowed shape holds {len(ids)} rows of {longest} tokens; allowed: {sorted(allowed)}")
    return min(fitting, key=lambda shape: shape[0] * shape[1])


def row_workloads(
    session: Session, rows: TokenRows, seq_len: Sequence[int], batch_size: int, side: str
) -> list[Workload]:
    """Return one full batch, without padding, for each length and batch size that the session takes.

    A session without fixed shapes takes every length of the case with a batch of one row as well.
    """
    fixed = {(shapes["input_ids"][1], shapes["input_ids"][0]) for shapes in session.shapes}
    free = {(length, batch) for length in seq_len for batch in (1, batch_size)}
    tokens, dtypes = np.concatenate(rows.ids), {spec.name: spec.dtype for spec in session.inputs}
    made = []
    for length, batch in sorted(fixed or free):
        full = np.split(np.resize(tokens, batch * length), batch)
        known = padded(full, batch, length, pad=rows.pad, side=side)
        feeds = {name: known[name].astype(dtype, copy=False) for name, dtype in dtypes.items() if name in known}
        made.append(Workload(f"seq_len {length}, batch {batch}", "latency", (feeds,), rows=batch))
    return made
