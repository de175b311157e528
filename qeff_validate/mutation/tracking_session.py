# SPDX-License-Identifier: Apache-2.0
"""A faulty session of a language model that tracks the decode loop of its caller by the feeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.models.causal_lm.decoder_interface import RECURRENT
from qeff_validate.mutation.mutant import FaultySession, Inapplicable
from qeff_validate.protocols import Session
from qeff_validate.tensors import RETAINED, Tensors

TOKENS = ("input_ids", "position_ids", "adapter_ids", "adapter_start", "batch_index")

Numbers = NDArray[Any]
Feeds = dict[str, Numbers]
Feed = Callable[[Any, Feeds], Mapping[str, Numbers]]


class DecodeTrackingSession(FaultySession):
    """A session with a fault that depends on the progress of the caller's decode loop.

    Args:
        session: the healthy one.
        feed: changes the feeds, as `FaultySession` has it.
        out: changes the outputs.
        zeroed: keys and values start as zeros, as on a machine that clears its memory; else a fault that reads an
            unwritten slot gives nothing but NaN.
        rows: the least number of rows in a decode run.

    With ``batch_index``, each prompt is a batch, and what is said of a row holds for the slot of its text.

    Attributes:
        batch: number of the batch of prompts, from 0.
        began: this run is the first of its batch.
        places: row or slot of each row's text.
        visit: number of the pass over the prompts with one adapter, or with all adapters of a mixed batch.
        adapter: number of the adapter, in the order of first visits; None where each row has its own.
        again: the adapter has been visited before.
        decoding: each row has at most one token; a prefill of one token a run looks the same.
        prompt: int64 ``[rows]``, how many tokens of its prompt each row has been fed.
        reach: int64 ``[rows]``, the greatest position of each row in this batch; -1 if there is none.
        before: ``reach`` at the end of the batch before.
        pad: the id of the padding token; 0 until one was fed.
        memory: state of the fault itself.
    """

    def __init__(
        self,
        session: Session,
        feed: Feed | None = None,
        out: Feed | None = None,
        *,
        zeroed: bool = False,
        rows: int = 1,
    ) -> None:
        super().__init__(session, feed, out)
        self._zeroed, self._min_rows = zeroed, rows
        self._visited: list[Tensors] = []
        self._first: Numbers = np.zeros(0)
        self._context: int | None = None
        self.batch, self.visit, self.pad = -1, -1, 0
        self.adapter: int | None = None
        self.began = self.again = self.decoding = False
        self.prompt = self.reach = self.before = self.places = np.zeros(0, np.int64)
        self._by_slot: dict[str, dict[int, int]] = {"prompt": {}, "reach": {}, "before": {}}
        self.memory: dict[str, Any] = {}
        if self.shapes:
            self._check_rows(max(shapes["input_ids"][0] for shapes in self.shapes))

    @property
    def state(self) -> list[str]:
        """Names of the inputs for keys and values."""
        return [spec.name for spec in self.inputs if spec.name.startswith("past_")]

    @property
    def weights(self) -> set[str]:
        """Names of the inputs for adapters."""
        return {spec.name for spec in self.inputs} - {*TOKENS, *self.state}

    @property
    def mixed(self) -> bool:
        """True if each row chooses its adapter."""
        return any(spec.name == "adapter_ids" for spec in self.inputs)

    @property
    def slotted(self) -> bool:
        """True if each row chooses the slot of its text (continuous batching)."""
        return any(spec.name == "batch_index" for spec in self.inputs)

    @property
    def slots(self) -> int:
        """Number of texts whose state is kept."""
        return len(next(iter(self.retained().values())))

    @property
    def recurrent(self) -> bool:
        """True if there are convolutional or recurrent states."""
        return any(name.startswith(RECURRENT) for name in self.state)

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the vocabulary; virtual tokens have greater ids."""
        return next(int(spec.shape[-1]) for spec in self.outputs if spec.name == "logits")

    @property
    def context(self) -> int:
        """Number of slots of the KV cache."""
        if self._context is None:
            self._context = int(next(iter(self.retained().values())).shape[2])
        return self._context

    def retained(self) -> Feeds:
        """Return the keys and values after the last run.

        A session returns them from a run only, so padding is run, which changes none of them.
        """
        padding = {**self.feeds, "position_ids": np.full_like(self.feeds["position_ids"], -1)}
        outputs = self.session.run(padding, fetch=[f"{name}{RETAINED}" for name in self.state])
        return {name: outputs[f"{name}{RETAINED}"] for name in self.state}

    def rerun(self, ids: Numbers, positions: Numbers) -> Numbers:
        """Run once more with other tokens in place of this run's, and return the logits."""
        feeds = {**self.feeds, "input_ids": ids, "position_ids": positions}
        logits: Numbers = self.session.run(feeds, fetch=["logits"])["logits"]
        return logits

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run with the fault."""
        if not self.slotted or feeds["position_ids"].shape[1] == 1:  # else a prompt is prefilled alone
            self._check_rows(len(feeds["input_ids"]))
        self._track(feeds)
        if self._zeroed and not self.runs:
            self.feeds = dict(feeds)
            feeds = {**feeds, **{name: np.zeros_like(array) for name, array in self.retained().items()}}
        return super().run(feeds, fetch=fetch)

    def _check_rows(self, rows: int) -> None:
        if rows < self._min_rows:
            raise Inapplicable(f"a batch has {rows} row(s), and this takes {self._min_rows}")

    def _track(self, feeds: Tensors) -> None:
        ids: Numbers = feeds["input_ids"]
        positions: Numbers = feeds["position_ids"]
        was_decoding, self.decoding = self.decoding, positions.shape[1] == 1
        if (positions < 0).any():
            self.pad = int(ids[positions < 0][0])
        if self.slotted:
            self._track_slots(feeds)
            return
        self.places = np.arange(len(positions))
        resized = self.reach.shape != positions.shape[:1]
        starts_over = not resized and ((positions == 0).any(axis=1) & (self.reach >= 0)).any()
        self.began = bool(resized or (not self.decoding and (was_decoding or starts_over)))
        if self.began:
            self.batch += 1
            self.before = np.full(len(positions), -1) if resized else self.reach
            self.reach = np.full(len(positions), -1)
            self.prompt = np.zeros(len(positions), np.int64)
            self._count_visit(feeds)
        self.reach = np.maximum(self.reach, positions.max(axis=1))
        if not self.decoding:
            self.prompt = self.reach + 1

    def _track_slots(self, feeds: Tensors) -> None:
        positions: Numbers = feeds["position_ids"]
        self.places = feeds["batch_index"].reshape(-1).astype(np.int64)
        prompt, reach, before = (self._by_slot[name] for name in ("prompt", "reach", "before"))
        self.began = bool((positions == 0).any())
        for place, row in zip(self.places.tolist(), positions, strict=True):
            if (row == 0).any():
                before[place], reach[place], prompt[place] = reach.get(place, -1), -1, 0
            reach[place] = max(reach.get(place, -1), int(row.max()))
            if not self.decoding:
                prompt[place] = reach[place] + 1
        if self.began:
            self.batch += 1
            self._count_visit(feeds)
        self.prompt, self.reach, self.before = (
            np.array([values.get(place, missing) for place in self.places.tolist()])
            for values, missing in ((prompt, 0), (reach, -1), (before, -1))
        )

    def _count_visit(self, feeds: Tensors) -> None:
        """Count visits: by the adapter that is fed, or, where none ever is, by the return of the first prompts."""
        if self.batch == 0:
            self._first = feeds["input_ids"].copy()
        adapter = {name: feeds[name] for name in self.weights if name in feeds}
        if self.mixed or not self.weights:
            if np.array_equal(feeds["input_ids"], self._first):
                self.visit, self.again = self.visit + 1, self.visit >= 0
        elif adapter:
            self.visit += 1
            known = [number for number, tensors in enumerate(self._visited) if _equal(tensors, adapter)]
            self.again, self.adapter = bool(known), known[0] if known else len(self._visited)
            if not known:
                self._visited.append(adapter)


def _equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
