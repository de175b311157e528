# SPDX-License-Identifier: Apache-2.0
"""The decode loop for every runtime: chunked prefill, then one token per step, over any session with state. Numpy only.

The session retains keys, values and adapter weights; the loop feeds tokens and positions, −1 for padding. Rows that
have ended, and unused rows of the batch, are fed padding only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qeff_validate.errors import RunError
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors

NEVER = 1 << 30
"""Position that no token reaches: an adapter that starts there has no effect."""


GREEDY: Mapping[str, Any] = {
    "do_sample": False, "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip
"""Settings of a generation config that greedy continuation has, and their neutral values."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes and stop rule of a decode loop.

    Attributes:
        batch_size: rows per run, if the session has no fixed shapes.
        prefill_seq_len: tokens of a row per prefill run, if the session has no fixed shapes.
        padding_side: side of the padding of shorter prompts: ``right`` or ``left``.
        pad: id of the padding token.
        eos: token ids that end a text.
        max_new_tokens: maximum number of steps.
        adapter: the adapter of every row, if the graph takes ``adapter_ids``.
        invocation: tokens from which on the adapter acts, if the graph takes ``adapter_start`` (activated LoRA).
    """

    batch_size: int
    prefill_seq_len: int
    padding_side: str
    pad: int
    eos: frozenset[int]
    max_new_tokens: int
    adapter: int = 0
    invocation: tuple[int, ...] = ()


def generate(
    session: Session,
    prompts: Sequence[Array],
    plan: Plan,
    *,
    state: Tensors | None = None,
    forced: Sequence[Array] | None = None,
    chunk: int | None = None,
    adapter_ids: Sequence[int] | None = None,
) -> list[Array]:
    """Continue prompts, greedily or along given tokens.

    Args:
        session: open, with inputs ``input_ids``, ``position_ids`` and retained state.
        prompts: token ids of each row, at least one.
        plan: sizes and stop rule.
        state: other retained inputs to set with the first run (the adapter's tensors); the session retains them.
        forced: the tokens of each row's continuation, for teacher forcing; None: greedy.
        chunk: tokens of a prompt per run; None: as many as the session allows.
        adapter_ids: the adapter of each prompt, if the graph takes ``adapter_ids``; None: that of the plan for all.

    Returns:
        For each row the logits of each token of its continuation, float32 ``[steps, vocab]``. A row ends with the step
        that chooses an end token, or after ``max_new_tokens``.

    Raises:
        RunError: the session refuses a run, or its logits have another shape.
    """
    logits: list[Array] = []
    initial_state = in_dtypes(session, state or {})
    batch, largest_chunk = sizes(session, plan)
    chunk = chunk or largest_chunk
    ids = [plan.adapter] * len(prompts) if adapter_ids is None else list(adapter_ids)
    for start, rows in batches(session, prompts, plan):
        texts = None if forced is None else forced[start : start + batch]
        places = np.array([*ids[start : start + batch], *[0] * (batch - len(rows))])
        fixed = in_dtypes(session, {"adapter_ids": places}) if takes_ids(session) else {}
        if takes_start(session):
            starts = [invocation_start(tokens, plan.invocation) for tokens in rows]
            unused = [NEVER] * (batch - len(rows))
            fixed = {**fixed, **in_dtypes(session, {"adapter_start": np.array([*starts, *unused])})}
        logits += _Batch(session, rows, plan, batch, chunk, fixed).run(initial_state, texts)
        initial_state = {}
    return logits


def batches(session: Session, prompts: Sequence[Array], plan: Plan) -> Iterator[tuple[int, Sequence[Array]]]:
    """Yield the prompts of each batch with the index of the first."""
    batch, _ = sizes(session, plan)
    for start in range(0, len(prompts), batch):
        yield start, prompts[start : start + batch]


def takes_ids(session: Session) -> bool:
    """Return True if each row selects its adapter by ``adapter_ids``."""
    return any(spec.name == "adapter_ids" for spec in session.inputs)


def takes_start(session: Session) -> bool:
    """Return True if the adapter of a row acts from the position ``adapter_start`` on (activated LoRA)."""
    return any(spec.name == "adapter_start" for spec in session.inputs)


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


def padding(session: Session, plan: Plan) -> Tensors:
    """Return the feeds of one step of padding only, which leaves the retained state unchanged."""
    batch, _ = sizes(session, plan)
    feeds: Tensors = {"input_ids": np.full((batch, 1), plan.pad), "position_ids": np.full((batch, 1), -1)}
    ids: Tensors = {"adapter_ids": np.zeros(batch)} if takes_ids(session) else {}
    starts: Tensors = {"adapter_start": np.full(batch, NEVER)} if takes_start(session) else {}
    return in_dtypes(session, {**feeds, **ids, **starts})


def sizes(session: Session, plan: Plan) -> tuple[int, int]:
    """Return the rows of a run, and the tokens of a row in a prefill run."""
    if not session.shapes:
        return plan.batch_size, plan.prefill_seq_len
    batch, chunk = max((shapes["input_ids"][0], shapes["input_ids"][1]) for shapes in session.shapes)
    return batch, chunk


class _Batch:
    """One batch of rows."""

    def __init__(
        self, session: Session, rows: Sequence[Array], plan: Plan, batch: int, chunk: int, fixed: Tensors
    ) -> None:
        self._session, self._rows, self._plan = session, rows, plan
        self._batch, self._chunk, self._fixed = batch, chunk, fixed

    def run(self, state: Tensors, forced: Sequence[Array] | None) -> list[Array]:
        plan, logits = self._plan, self._prefill(state)
        steps: list[list[Array]] = [[] for _ in self._rows]
        for step in range(plan.max_new_tokens):
            ids = np.full((self._batch, 1), plan.pad, dtype=np.int64)
            places = np.full((self._batch, 1), -1, dtype=np.int64)
            for row, row_logits in enumerate(logits):
                if row_logits is None:
                    continue
                steps[row].append(row_logits)
                token = self._next_token(row_logits, step, None if forced is None else forced[row])
                if token is not None:
                    ids[row, 0], places[row, 0] = token, self._rows[row].size + step
            active = places[: len(self._rows), 0] >= 0
            if step + 1 == plan.max_new_tokens or not active.any():
                break
            step_logits = self._step(ids, places, {})
            logits = [step_logits[row] if active[row] else None for row in range(len(self._rows))]
        return [np.stack(row_steps) for row_steps in steps]

    def _next_token(self, logits: Array, step: int, forced: Array | None) -> int | None:
        """Return the next token; None if the row ends."""
        if forced is not None:
            return int(forced[step]) if step + 1 < forced.size else None
        token = int(np.argmax(logits))
        return None if token in self._plan.eos else token

    def _prefill(self, state: Tensors) -> list[Array | None]:
        last_logits: list[Array | None] = [None] * len(self._rows)
        for ids, places in self._chunks():
            logits = self._step(ids, places, state)
            state = {}
            for row, tokens in enumerate(self._rows):
                if tokens.size - 1 in places[row]:
                    last_logits[row] = logits[row]
        return last_logits

    def _chunks(self) -> Iterator[tuple[Array, Array]]:
        width = -(-max(row.size for row in self._rows) // self._chunk) * self._chunk
        ids = np.full((self._batch, width), self._plan.pad, dtype=np.int64)
        places = np.full((self._batch, width), -1, dtype=np.int64)
        for row, tokens in enumerate(self._rows):
            columns = slice(0, tokens.size) if self._plan.padding_side == "right" else slice(width - tokens.size, width)
            ids[row, columns], places[row, columns] = tokens, np.arange(tokens.size)
        for start in range(0, width, self._chunk):
            yield ids[:, start : start + self._chunk], places[:, start : start + self._chunk]

    def _step(self, ids: Array, places: Array, state: Tensors) -> Array:
        feeds = in_dtypes(self._session, {"input_ids": ids, "position_ids": places})
        logits = self._session.run({**feeds, **self._fixed, **state}, fetch=["logits"])["logits"]
        if logits.ndim == 3 and logits.shape[0] == self._batch:
            if logits.shape[1] == 1:
                return logits[:, 0]
            if logits.shape[1] == ids.shape[1]:  # a user's graph may return logits for every position
                last: Array = logits[np.arange(self._batch), places.argmax(axis=1)]
                return last
        raise RunError(f"logits have shape {list(logits.shape)}, wanted [{self._batch}, 1 or {ids.shape[1]}, vocab]")


def sampling_notes(model: Any) -> list[str]:
    """Return a note if a model's generation_config.json asks for something else than greedy continuation.

    Args:
        model: of transformers, or a PeftModel around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "generation_config", None)
    asked = {name: getattr(config, name, None) for name in GREEDY}
    ignored = [f"{name}: {value}" for name, value in asked.items() if value not in (None, GREEDY[name])]
    if not ignored:
        return []
    return [f"generation_config asks for {', '.join(ignored)}, which is ignored: texts are continued greedily"]
