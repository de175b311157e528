# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: prompts come into slots as these become free, beside texts that go on. Numpy only.

The graph takes ``batch_index`` ``[rows, 1]``, as upstream's does: the slot of each row's text. A prompt is prefilled
alone into its slot, a decode run takes one token of each row, and the slot of a text that has ended takes the next
prompt; what it holds of its former occupant stays where it is. Where there are more slots than rows, a row moves on to
the slot that has been free for the longest time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qeff_validate.models.causal_lm.decoder_feeds import (
    Plan,
    RunSizes,
    in_dtypes,
    next_token,
    prefill_chunks,
    step_logits,
)
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors


@dataclass(frozen=True, slots=True)
class _Text:
    """A text that goes on: its prompt, and the token to feed next with its position."""

    prompt: int
    token: int
    position: int


class SlotLoop:
    """Continues prompts on a session with slots.

    Args:
        session: open.
        prompts: token ids of each prompt.
        plan: sizes and stop rule.
        sizes: of the session's runs.
        by_prompt: value of further inputs for each prompt, and for rows of padding, by name.
        kept: how many first tokens of each prompt its slot holds already.
        slots: order in which slots are taken; None: ascending.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Array],
        plan: Plan,
        sizes: RunSizes,
        by_prompt: Mapping[str, tuple[Array, int]],
        kept: Sequence[int],
        slots: Sequence[int] | None = None,
    ) -> None:
        self._session, self._prompts, self._plan, self._sizes = session, prompts, plan, sizes
        self._by_prompt, self._kept = by_prompt, kept
        order = list(range(sizes.slots)) if slots is None else list(slots)
        self._slots, self._free_slots = order[: sizes.rows], deque(order[sizes.rows :])
        self._free_rows, self._used_rows = deque(range(sizes.rows)), set[int]()
        self._texts: list[_Text | None] = [None] * sizes.rows
        self._steps: list[list[Array]] = [[] for _ in prompts]

    def run(self, state: Tensors, forced: Sequence[Array] | None) -> list[Array]:
        """Return the logits of each prompt's continuation, ``[steps, vocab]``; see `decode_loop.generate`."""
        waiting = deque(range(len(self._prompts)))
        while True:
            while waiting and self._free_rows:
                row, prompt = self._next_row(), waiting.popleft()
                logits, state = self._prefill(row, prompt, state), {}
                self._go_on(row, prompt, logits, forced)
            texts = list(self._texts)
            if not any(texts):
                return [np.stack(steps) for steps in self._steps]
            logits = self._decode(texts)
            for row, text in enumerate(texts):
                if text is not None:
                    self._go_on(row, text.prompt, logits[row], forced)

    def _next_row(self) -> int:
        """Return the row that has been free for the longest time; move it to another slot if there are spare ones."""
        row = self._free_rows.popleft()
        if row in self._used_rows:
            self._free_slots.append(self._slots[row])
            self._slots[row] = self._free_slots.popleft()
        self._used_rows.add(row)
        return row

    def _go_on(self, row: int, prompt: int, logits: Array, forced: Sequence[Array] | None) -> None:
        """Keep the logits of a step; the text of the row goes on, or leaves its row."""
        steps = self._steps[prompt]
        token = next_token(logits, len(steps), None if forced is None else forced[prompt], self._plan.eos)
        position = self._prompts[prompt].size + len(steps)
        steps.append(logits)
        if token is None or len(steps) == self._plan.max_new_tokens:
            self._texts[row] = None
            self._free_rows.append(row)
        else:
            self._texts[row] = _Text(prompt, token, position)

    def _prefill(self, row: int, prompt: int, state: Tensors) -> Array:
        """Return the logits after a prompt, ``[vocab]``."""
        tokens = self._prompts[prompt]
        last: Array | None = None
        rows = self._sizes.prefill_rows
        at, slots = (0, [self._slots[row]]) if rows == 1 else (row, self._slots)
        texts = [prompt if place == at else None for place in range(rows)]
        for ids, places in prefill_chunks({at: tokens}, {at: self._kept[prompt]}, self._sizes, self._plan):
            logits = step_logits(self._session, ids, places, {**self._feeds(texts, slots), **state})
            state = {}
            if tokens.size - 1 in places[at]:
                last = logits[at]
        assert last is not None
        return last

    def _decode(self, texts: Sequence[_Text | None]) -> Array:
        """Feed each text its next token, and return the logits ``[rows, vocab]``."""
        ids = np.array([[self._plan.pad if text is None else text.token] for text in texts])
        places = np.array([[-1 if text is None else text.position] for text in texts])
        prompts = [None if text is None else text.prompt for text in texts]
        return step_logits(self._session, ids, places, self._feeds(prompts, self._slots))

    def _feeds(self, prompts: Sequence[int | None], slots: Sequence[int]) -> Tensors:
        """Return the inputs beside tokens and positions, for rows with these prompts in these slots."""
        feeds = {
            name: np.array([idle if prompt is None else values[prompt] for prompt in prompts])
            for name, (values, idle) in self._by_prompt.items()
        }
        return in_dtypes(self._session, {**feeds, "batch_index": np.array(slots)[:, None]})
