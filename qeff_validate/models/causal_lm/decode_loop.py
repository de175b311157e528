# SPDX-License-Identifier: Apache-2.0
"""The decode loop for every runtime: chunked prefill, then one token per step, over any session with state. Numpy only.

The session retains keys, values and adapter weights; the loop feeds tokens and positions, −1 for padding. Rows that
have ended, and unused rows of the batch, are fed padding only. A graph that takes ``batch_index`` is served by
continuous batching (`continuous_batching`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qeff_validate.models.causal_lm.continuous_batching import SlotLoop
from qeff_validate.models.causal_lm.decoder_feeds import (
    NEVER,
    Plan,
    RunSizes,
    in_dtypes,
    invocation_start,
    next_token,
    prefill_chunks,
    run_sizes,
    step_logits,
    takes_ids,
    takes_slots,
    takes_start,
)
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors


def generate(
    session: Session,
    prompts: Sequence[Array],
    plan: Plan,
    *,
    state: Tensors | None = None,
    forced: Sequence[Array] | None = None,
    chunk: int | None = None,
    adapter_ids: Sequence[int] | None = None,
    kept: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
) -> list[Array]:
    """Continue prompts, greedily or along given tokens.

    Args:
        session: open, with inputs ``input_ids``, ``position_ids`` and retained state.
        prompts: token ids of each row, at least one.
        plan: sizes and stop rule.
        state: other retained inputs to set with the first run (the adapter's tensors); the session retains them.
        forced: the tokens of each row's continuation, for teacher forcing; None: greedy.
        chunk: tokens of a prompt per run; None: as the session allows.
        adapter_ids: the adapter of each prompt, if the graph takes ``adapter_ids``; None: that of the plan for all.
        kept: how many first tokens of each prompt its slot holds already (prefix caching), less than the prompt has;
            prompts are put into rows and slots in their order. None: none.
        slots: order in which the slots are taken, if the graph takes ``batch_index``; None: ascending.

    Returns:
        For each row the logits of each token of its continuation, float32 ``[steps, vocab]``. A row ends with the step
        that chooses an end token, or after ``max_new_tokens``.

    Raises:
        RunError: the session refuses a run, or its logits have another shape.
    """
    initial_state = in_dtypes(session, state or {})
    sizes = run_sizes(session, plan)
    if chunk is not None:
        sizes = sizes.in_chunks(chunk)
    kept = [0] * len(prompts) if kept is None else kept
    ids = [plan.adapter] * len(prompts) if adapter_ids is None else list(adapter_ids)
    by_prompt: dict[str, tuple[Array, int]] = {}  # and what rows of padding are fed
    if takes_ids(session):
        by_prompt["adapter_ids"] = np.array(ids), 0
    if takes_start(session):
        by_prompt["adapter_start"] = np.array([invocation_start(row, plan.invocation) for row in prompts]), NEVER
    if takes_slots(session):
        loop = SlotLoop(session, prompts, plan, sizes, by_prompt, kept, slots)
        return loop.run(initial_state, forced)
    logits: list[Array] = []
    for start, rows in batches(session, prompts, plan):
        part = slice(start, start + len(rows))
        fixed = {name: np.full(sizes.rows, idle) for name, (_, idle) in by_prompt.items()}
        for name, (values, _) in by_prompt.items():
            fixed[name][: len(rows)] = values[part]
        batch = _Batch(session, rows, plan, sizes, in_dtypes(session, fixed), kept[part])
        logits += batch.run(initial_state, None if forced is None else forced[part])
        initial_state = {}
    return logits


def batches(session: Session, prompts: Sequence[Array], plan: Plan) -> Iterator[tuple[int, Sequence[Array]]]:
    """Yield the prompts of each batch with the index of the first."""
    batch = run_sizes(session, plan).rows
    for start in range(0, len(prompts), batch):
        yield start, prompts[start : start + batch]


class _Batch:
    """One batch of rows."""

    def __init__(
        self,
        session: Session,
        rows: Sequence[Array],
        plan: Plan,
        sizes: RunSizes,
        fixed: Tensors,
        kept: Sequence[int],
    ) -> None:
        self._session, self._rows, self._plan = session, rows, plan
        self._batch, self._sizes, self._fixed, self._kept = sizes.rows, sizes, fixed, kept

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
                token = next_token(row_logits, step, None if forced is None else forced[row], plan.eos)
                if token is not None:
                    ids[row, 0], places[row, 0] = token, self._rows[row].size + step
            active = places[: len(self._rows), 0] >= 0
            if step + 1 == plan.max_new_tokens or not active.any():
                break
            step_logits = self._step(ids, places, {})
            logits = [step_logits[row] if active[row] else None for row in range(len(self._rows))]
        return [np.stack(row_steps) for row_steps in steps]

    def _prefill(self, state: Tensors) -> list[Array | None]:
        last_logits: list[Array | None] = [None] * len(self._rows)
        rows, kept = dict(enumerate(self._rows)), dict(enumerate(self._kept))
        for ids, places in prefill_chunks(rows, kept, self._sizes, self._plan):
            logits = self._step(ids, places, state)
            state = {}
            for row, tokens in enumerate(self._rows):
                if tokens.size - 1 in places[row]:
                    last_logits[row] = logits[row]
        return last_logits

    def _step(self, ids: Array, places: Array, state: Tensors) -> Array:
        return step_logits(self._session, ids, places, {**self._fixed, **state})
