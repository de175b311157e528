# SPDX-License-Identifier: Apache-2.0
"""What a decoder's session is fed: sizes of its runs, and inputs beside tokens and positions. Numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qeff_validate.errors import RunError
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors

NEVER = 1 << 30
"""Position that no token reaches: an adapter that starts there has no effect."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes and stop rule of a decode loop.

    Attributes:
        batch_size: rows of a decode run, if the session has no fixed shapes.
        prefill_lengths: tokens of a row per prefill run; a session with fixed shapes that has none of these has others.
        padding_side: side of the padding of shorter prompts: ``right`` or ``left``.
        pad: id of the padding token.
        eos: token ids that end a text.
        max_new_tokens: maximum number of steps.
        adapter: the adapter of every row, if the graph takes ``adapter_ids``.
        invocation: tokens from which on the adapter acts, if the graph takes ``adapter_start`` (activated LoRA).
        slots: texts whose state the session keeps, if the graph takes ``batch_index`` and has no fixed shapes.
    """

    batch_size: int
    prefill_lengths: tuple[int, ...]
    padding_side: str
    pad: int
    eos: frozenset[int]
    max_new_tokens: int
    adapter: int = 0
    invocation: tuple[int, ...] = ()
    slots: int = 0


@dataclass(frozen=True, slots=True)
class RunSizes:
    """Sizes of the runs of a session.

    Attributes:
        rows: rows of a decode run.
        prefill_rows: rows of a prefill run; one, if the graph takes ``batch_index``.
        lengths: tokens of a row in a prefill run, ascending.
        slots: texts whose state the session keeps; as many as rows, if the graph takes no ``batch_index``.
    """

    rows: int
    prefill_rows: int
    lengths: tuple[int, ...]
    slots: int

    def chunks(self, tokens: int) -> list[int]:
        """Return the length of each prefill run of so many tokens: the smallest that fits the rest, or the greatest."""
        chunks: list[int] = []
        while tokens > 0:
            chunks.append(next((length for length in self.lengths if length >= tokens), self.lengths[-1]))
            tokens -= chunks[-1]
        return chunks

    def in_chunks(self, length: int) -> RunSizes:
        """Return the sizes where prompts are prefilled in chunks of another length, if need be by decode runs."""
        rows = self.prefill_rows if length in self.lengths else self.rows
        return RunSizes(self.rows, rows, (length,), self.slots)


def run_sizes(session: Session, plan: Plan) -> RunSizes:
    """Return the sizes of a session's runs: those of its fixed shapes, else those of the plan."""
    by_slot = takes_slots(session)
    if not session.shapes:
        rows = plan.batch_size
        slots = max(plan.slots, rows) if by_slot else rows
        return RunSizes(rows, 1 if by_slot else rows, tuple(sorted(plan.prefill_lengths)), slots)
    shapes = {(shapes["input_ids"][0], shapes["input_ids"][1]) for shapes in session.shapes}
    rows = max(batch for batch, _ in shapes)
    prefill_rows = min(batch for batch, _ in shapes) if by_slot else rows
    lengths = sorted(length for batch, length in shapes if batch == prefill_rows)
    lengths = (
        [length for length in lengths if length in plan.prefill_lengths]
        or [length for length in lengths if length > 1]
        or lengths
    )
    states = [name for name in session.shapes[0] if name.startswith("past_")]
    slots = max((shapes[name][0] for shapes in session.shapes for name in states), default=rows)
    return RunSizes(rows, prefill_rows, tuple(lengths), slots if by_slot else rows)


def takes_ids(session: Session) -> bool:
    """Return True if each row selects its adapter by ``adapter_ids``."""
    return any(spec.name == "adapter_ids" for spec in session.inputs)


def takes_start(session: Session) -> bool:
    """Return True if the adapter of a row acts from the position ``adapter_start`` on (activated LoRA)."""
    return any(spec.name == "adapter_start" for spec in session.inputs)


def takes_slots(session: Session) -> bool:
    """Return True if each row selects the slot of its text by ``batch_index`` (continuous batching)."""
    return any(spec.name == "batch_index" for spec in session.inputs)


def invocation_start(tokens: Array, invocation: Sequence[int]) -> int:
    """Return the position of the last invocation in a prompt, `NEVER` if there is none."""
    size = len(invocation)
    starts = [at for at in range(tokens.size - size + 1) if tokens[at : at + size].tolist() == list(invocation)]
    return starts[-1] if starts else NEVER


def in_dtypes(session: Session, feeds: Tensors) -> Tensors:
    """Return feeds in the dtypes of the session's inputs.

    Raises:
        RunError: there is no such input.
    """
    dtypes = {spec.name: spec.dtype for spec in session.inputs}
    missing = sorted(set(feeds) - set(dtypes))
    if missing:
        raise RunError(f"the graph has no input {', '.join(missing[:4])}: its adapters are no inputs (lift_adapters)")
    return {name: array.astype(dtypes[name], copy=False) for name, array in feeds.items()}


def idle_feeds(session: Session, rows: int) -> Tensors:
    """Return the inputs beside tokens and positions for rows of padding: the base, and a slot for each row."""
    ids: Tensors = {"adapter_ids": np.zeros(rows)} if takes_ids(session) else {}
    starts: Tensors = {"adapter_start": np.full(rows, NEVER)} if takes_start(session) else {}
    slots: Tensors = {"batch_index": np.arange(rows)[:, None]} if takes_slots(session) else {}
    return in_dtypes(session, {**ids, **starts, **slots})


def padding(session: Session, plan: Plan) -> Tensors:
    """Return the feeds of one decode step of padding only, which leaves the retained state unchanged."""
    rows = run_sizes(session, plan).rows
    feeds: Tensors = {"input_ids": np.full((rows, 1), plan.pad), "position_ids": np.full((rows, 1), -1)}
    return {**in_dtypes(session, feeds), **idle_feeds(session, rows)}


def step_logits(session: Session, ids: Array, places: Array, feeds: Tensors) -> Array:
    """Run once and return the logits of each row's last real token, float ``[rows, vocab]``.

    Args:
        session: open.
        ids: token ids ``[rows, seq_len]``.
        places: positions, −1 for padding, ``[rows, seq_len]``.
        feeds: other inputs.

    Raises:
        RunError: the session refuses the run, or its logits have another shape.
    """
    tokens = in_dtypes(session, {"input_ids": ids, "position_ids": places})
    logits = session.run({**tokens, **feeds}, fetch=["logits"])["logits"]
    rows, length = ids.shape
    if logits.ndim == 3 and logits.shape[0] == rows:
        if logits.shape[1] == 1:
            return logits[:, 0]
        if logits.shape[1] == length:  # a user's graph may return logits for every position
            last: Array = logits[np.arange(rows), places.argmax(axis=1)]
            return last
    raise RunError(f"logits have shape {list(logits.shape)}, wanted [{rows}, 1 or {length}, vocab]")


def prefill_chunks(
    rows: Mapping[int, Array], kept: Mapping[int, int], sizes: RunSizes, plan: Plan
) -> Iterator[tuple[Array, Array]]:
    """Yield token ids and positions of each prefill run, int64 ``[rows, seq_len]``.

    Args:
        rows: the prompt of each row; other rows are padding.
        kept: how many of its first tokens the session holds already.
        sizes: of the session's runs.
        plan: padding.
    """
    rest = {row: tokens.size - kept[row] for row, tokens in rows.items()}
    lengths = sizes.chunks(max(rest.values()))
    width = sum(lengths)
    ids = np.full((sizes.prefill_rows, width), plan.pad, dtype=np.int64)
    places = np.full((sizes.prefill_rows, width), -1, dtype=np.int64)
    for row, tokens in rows.items():
        columns = slice(0, rest[row]) if plan.padding_side == "right" else slice(width - rest[row], width)
        ids[row, columns], places[row, columns] = tokens[kept[row] :], np.arange(kept[row], tokens.size)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        yield ids[:, end - length : end], places[:, end - length : end]


def next_token(logits: Array, step: int, forced: Array | None, eos: frozenset[int]) -> int | None:
    """Return the next token, the greatest logit's or the one that is forced; None if the text ends."""
    if forced is not None:
        return int(forced[step]) if step + 1 < forced.size else None
    token = int(np.argmax(logits))
    return None if token in eos else token
