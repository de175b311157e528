# SPDX-License-Identifier: Apache-2.0
"""A damaged session of a language model that tracks its caller's decode loop by what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.mutation.mutant import FaultySession, Inapplicable
from qeff_validate.protocols import Session
from qeff_validate.tensors import RETAINED, Tensors

TOKENS = ("input_ids", "position_ids", "adapter_ids")

Numbers = NDArray[Any]
Feeds = dict[str, Numbers]
Feed = Callable[[Any, Feeds], Mapping[str, Numbers]]


class DecodeTrackingSession(FaultySession):
    """A session with a fault, and its caller's place.

    Args:
        session: the healthy one.
        feed: changes the feeds, as `FaultySession` has it.
        out: changes the outputs.
        zeroed: keys and values start with zeros, as on a machine that clears its memory, so that what a fault does is
            not NaN alone.
        rows: so many rows a batch must have.

    Attributes:
        batch: number of the batch of prompts, from 0.
        began: this run is a batch's first.
        visit: number of the visit to an adapter, or to all of a mixed batch.
        adapter: which adapter is visited, in the order of first visits; None where each row has its own.
        again: it has been visited before.
        decoding: each row has one token at most; a prefill of one token a run looks the same.
        prompt: for each row, how many tokens of its prompt have been fed.
        reach: for each row, the greatest position in this batch, −1 if there is none.
        before: the same for the batch before.
        pad: the id of padding; 0 until some is seen.
        memory: what a fault has to remember.
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
        self._zeroed, self._least = zeroed, rows
        self._visited: list[Tensors] = []
        self._first: Numbers = np.zeros(0)
        self._context: int | None = None
        self.batch, self.visit, self.pad = -1, -1, 0
        self.adapter: int | None = None
        self.began = self.again = self.decoding = False
        self.prompt = self.reach = self.before = np.zeros(0, np.int64)
        self.memory: dict[str, Any] = {}
        for shapes in self.shapes:
            self._enough(shapes["input_ids"][0])

    @property
    def state(self) -> list[str]:
        """The inputs that hold keys and values."""
        return [spec.name for spec in self.inputs if spec.name.startswith("past_")]

    @property
    def weights(self) -> set[str]:
        """The inputs that hold adapters."""
        return {spec.name for spec in self.inputs} - {*TOKENS, *self.state}

    @property
    def mixed(self) -> bool:
        """Each row chooses its adapter."""
        return any(spec.name == "adapter_ids" for spec in self.inputs)

    @property
    def context(self) -> int:
        """How many slots there are."""
        if self._context is None:
            self._context = int(next(iter(self.kept().values())).shape[2])
        return self._context

    def kept(self) -> Feeds:
        """Return keys and values as the last run left them: a session shows them in a run only, so one of padding."""
        padding = {**self.feeds, "position_ids": np.full_like(self.feeds["position_ids"], -1)}
        found = self._session.run(padding, fetch=[f"{name}{RETAINED}" for name in self.state])
        return {name: found[f"{name}{RETAINED}"] for name in self.state}

    def rerun(self, ids: Numbers, places: Numbers) -> Numbers:
        """Return the logits of other tokens in the stead of this run's, after it."""
        feeds = {**self.feeds, "input_ids": ids, "position_ids": places}
        found: Numbers = self._session.run(feeds, fetch=["logits"])["logits"]
        return found

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run with the fault."""
        self._enough(len(feeds["input_ids"]))
        self._follow(feeds)
        if self._zeroed and not self.runs:
            self.feeds = dict(feeds)
            feeds = {**feeds, **{name: np.zeros_like(array) for name, array in self.kept().items()}}
        return super().run(feeds, fetch=fetch)

    def _enough(self, rows: int) -> None:
        if rows < self._least:
            raise Inapplicable(f"a batch has {rows} row(s), and this takes {self._least}")

    def _follow(self, feeds: Tensors) -> None:
        ids: Numbers = feeds["input_ids"]
        places: Numbers = feeds["position_ids"]
        decoded, self.decoding = self.decoding, places.shape[1] == 1
        if (places < 0).any():
            self.pad = int(ids[places < 0][0])
        fresh = self.reach.shape != places.shape[:1]
        starts_over = not fresh and ((places == 0).any(axis=1) & (self.reach >= 0)).any()
        self.began = bool(fresh or (not self.decoding and (decoded or starts_over)))
        if self.began:
            self.batch += 1
            self.before = np.full(len(places), -1) if fresh else self.reach
            self.reach = np.full(len(places), -1)
            self.prompt = np.zeros(len(places), np.int64)
            self._visits(feeds)
        self.reach = np.maximum(self.reach, places.max(axis=1))
        if not self.decoding:
            self.prompt = self.reach + 1

    def _visits(self, feeds: Tensors) -> None:
        """Tell visits apart: by the adapter that is fed, or, where none ever is, by the first prompts' return."""
        if self.batch == 0:
            self._first = feeds["input_ids"].copy()
        fed = {name: feeds[name] for name in self.weights if name in feeds}
        if self.mixed or not self.weights:
            if np.array_equal(feeds["input_ids"], self._first):
                self.visit, self.again = self.visit + 1, self.visit >= 0
        elif fed:
            self.visit += 1
            known = [at for at, tensors in enumerate(self._visited) if _equal(tensors, fed)]
            self.again, self.adapter = bool(known), known[0] if known else len(self._visited)
            if not known:
                self._visited.append(fed)


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
