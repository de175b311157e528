# SPDX-License-Identifier: Apache-2.0
"""Results that are made when they are asked for, so that a report of many need not hold them in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

from qeff_validate.report.result import Result


class LazyResults(Sequence[Result]):
    """Results of a report, each of which is made or read anew whenever it is asked for.

    Args:
        count: how many there are.
        make: returns the result at a place, which counts from 0.

    Examples:
        >>> LazyResults(2, lambda place: Result("small", ("ort", "sim")[place], "pass"))[-1].runtime
        'sim'
    """

    def __init__(self, count: int, make: Callable[[int], Result]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Result: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Result]: ...

    def __getitem__(self, place: int | slice) -> Result | Sequence[Result]:
        places = range(self._count)[place]
        if isinstance(places, range):
            return LazyResults(len(places), lambda at: self._make(places[at]))
        return self._make(places)


def planned_results(
    places: Sequence[tuple[str, str]], made: Mapping[tuple[str, str], Result], why_missing: str
) -> LazyResults:
    """Return the results of a plan, in its order.

    Args:
        places: case and runtime of each.
        made: those that there are.
        why_missing: the reason of the others, which have not run.
    """

    def at(place: int) -> Result:
        found = made.get(places[place])
        return Result(*places[place], "not_run", why_missing) if found is None else found

    return LazyResults(len(places), at)
