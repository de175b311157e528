# SPDX-License-Identifier: Apache-2.0
"""The search for the smallest list of nodes in float32: what it finds, and how often it compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from qeff_validate.explain.float32_nodes import MOST_BY_ERROR, Search, search, starting_lists
from qeff_validate.explain.range_audit import NodeRange, RangeAudit

NAMES = list("abcdefgh")


def counted(needed: str) -> tuple[list[list[str]], Callable[[Sequence[str]], bool]]:
    """A judge that passes if all needed names are there, and the lists that it was asked about."""
    asked: list[list[str]] = []

    def passes(names: Sequence[str]) -> bool:
        asked.append(list(names))
        return set(needed) <= set(names)

    return asked, passes


@pytest.mark.parametrize("needed", ["a", "h", "de", "abcd"])
def test_smallest_list_is_found_in_the_order_of_the_graph(needed: str) -> None:
    asked, passes = counted(needed)
    found = search([NAMES], passes, 100)
    assert (found.names, found.smallest, found.trials) == (tuple(needed), True, len(asked))
    assert found.tried == tuple(NAMES)
    assert len({tuple(names) for names in asked}) == len(asked), "no list is compiled twice"


def test_search_ends_with_its_trials_and_keeps_a_list_that_passed() -> None:
    asked, passes = counted("bg")
    found = search([NAMES], passes, 5)
    assert len(asked) == found.trials == 5
    assert found.names is not None
    assert set("bg") <= set(found.names)
    assert not found.smallest


def test_nothing_found_names_the_longest_list() -> None:
    asked, passes = counted("z")
    assert search([["a"], ["a", "b"]], passes) == Search(None, ("a", "b"), 2)
    assert asked == [["a"], ["a", "b"]]
    assert search([], passes) == Search(None, (), 0)


def test_second_list_is_made_smaller_if_the_first_does_not_do() -> None:
    _, passes = counted("d")
    assert search([["a"], ["a", "c", "d"]], passes).names == ("d",)


def node(name: str, *reads: str, error: float = 2e-4, overflows: int = 0, reads_clipped: bool = False) -> NodeRange:
    return NodeRange(name, "Mul", "", 1.0, 0.0, error, overflows, reads, reads_clipped)


def test_search_starts_with_what_overflows_and_goes_on_with_what_rounds_badly() -> None:
    nodes = (
        node("a", error=float("inf"), overflows=3),
        node("b", "a"),
        node("c", error=1e-2),
        node("d", reads_clipped=True),
        node("e", "b"),
    )
    assert starting_lists(RangeAudit(nodes)) == [["a", "b"], ["a", "b", "c", "d"]]
    assert starting_lists(RangeAudit(nodes[1:2])) == []


def test_of_many_nodes_that_round_badly_the_worst_are_tried() -> None:
    nodes = tuple(node(str(i), error=1e-2 + i) for i in range(2 * MOST_BY_ERROR))
    assert starting_lists(RangeAudit(nodes)) == [[str(i) for i in range(MOST_BY_ERROR, 2 * MOST_BY_ERROR)]]
