# SPDX-License-Identifier: Apache-2.0
"""Which unit a free worker does next. Nothing runs here: an executor asks, and tells what came of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from qeff_validate.pipeline.executors.units import Unit

MOST_TRIES = 3
"""A unit whose worker is lost is done elsewhere, at most twice."""


@dataclass
class Schedule:
    """The units of a run, and their state.

    Args:
        units: each after those that it needs.
        megabytes: estimates of the memory that units take, by id; 0 if unknown.
        limit: memory in 10^6 bytes that all running units together may take; a single one always may.
        cards: ids of the real cards; a unit that wants more than there are gets all, and says what is wrong.
    """

    units: Sequence[Unit]
    megabytes: Mapping[str, float] = field(default_factory=dict)
    limit: float = float("inf")
    cards: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._waiting = {unit.id: unit for unit in self.units}
        self._running: dict[Hashable, Unit] = {}
        self._ended: set[str] = set()
        self._case: dict[Hashable, str] = {}
        self._started: set[str] = set()
        self._cards: dict[Hashable, list[int]] = {}
        self._by_use = [*self.cards]
        self.losses: dict[str, list[str]] = {}
        """For each unit whose worker was lost: what happened to it, each time."""

    @property
    def done(self) -> bool:
        """True if nothing waits and nothing runs."""
        return not self._waiting and not self._running

    @property
    def waiting(self) -> list[Unit]:
        """The units that have not begun."""
        return [*self._waiting.values()]

    def is_busy(self, worker: Hashable) -> bool:
        """Return whether a worker has a unit."""
        return worker in self._running

    def take(self, worker: Hashable, fits: Callable[[Unit], bool] = lambda _: True) -> Unit | None:
        """Return a unit for a free worker, which then runs; None if there is none for it now.

        A worker goes on with its case, which it has loaded; then it begins another; then it helps with one of others.

        Args:
            worker: which has none.
            fits: whether it can do a unit.
        """
        ready = [unit for unit in self._waiting.values() if self._may_run(unit) and fits(unit)]
        if not ready:
            return None
        own = self._case.get(worker)

        def distance(unit: Unit) -> int:
            return 0 if unit.case == own else 1 if unit.case not in self._started else 2

        chosen = min(ready, key=distance)  # of equal ones the first
        del self._waiting[chosen.id]
        self._running[worker] = chosen
        if chosen.cards:
            taken = self._cards[worker] = self._free_cards()[: chosen.cards]
            self._by_use = [*(card for card in self._by_use if card not in taken), *taken]
        self._case[worker] = chosen.case
        self._started.add(chosen.case)
        return chosen

    def cards_of(self, worker: Hashable) -> list[int]:
        """Return the ids of the cards that the unit of a worker has for itself."""
        return self._cards.get(worker, [])

    def end(self, worker: Hashable) -> Unit:
        """Take note that a worker has done its unit, and return that."""
        unit = self._running.pop(worker)
        self._cards.pop(worker, None)
        self._ended.add(unit.id)
        return unit

    def lose(self, worker: Hashable, how: str) -> Unit | None:
        """Take note that a worker is lost; return its unit if it is given up after `MOST_TRIES`.

        Args:
            worker: it takes no unit any more.
            how: for the history of the unit, such as ``was killed by SIGKILL``.
        """
        self._case.pop(worker, None)
        self._cards.pop(worker, None)
        unit = self._running.pop(worker, None)
        if unit is None:
            return None
        if unit.case not in self._case.values():
            self._started.discard(unit.case)
        history = self.losses.setdefault(unit.id, [])
        history.append(how)
        if len(history) >= MOST_TRIES:
            self._ended.add(unit.id)  # what needs it tries by itself
            return unit
        self._waiting = {unit.id: unit, **self._waiting}
        return None

    def withdraw(self, cards: Sequence[int]) -> bool:
        """Give cards to no unit any more; return False, and do nothing, if no other one would be left."""
        left = [card for card in self._by_use if card not in cards]
        if left:
            self.cards = self._by_use = left
        return bool(left)

    def _may_run(self, unit: Unit) -> bool:
        running = self._running.values()
        if not self._ended.issuperset(unit.needs):
            return False
        if unit.shares and any(other.shares == unit.shares for other in running):
            return False
        others_have_cards = any(other.cards for other in running)
        if unit.cards and others_have_cards and len(self._free_cards()) < min(unit.cards, len(self.cards) or 1):
            return False
        taken = sum(self.megabytes.get(other.id, 0.0) for other in running)
        return not self._running or taken + self.megabytes.get(unit.id, 0.0) <= self.limit

    def _free_cards(self) -> list[int]:
        """Return the cards that no unit has, the one that was used the longest ago first."""
        taken = {card for cards in self._cards.values() for card in cards}
        return [card for card in self._by_use if card not in taken]
