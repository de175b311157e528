# SPDX-License-Identifier: Apache-2.0
"""The search for the smallest list of nodes in float32 with which a case passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qeff_validate.explain.range_audit import RangeAudit

MOST_TRIALS = 12
"""Compilations of one search, the one without a list included."""

NORMAL_ERROR = 2.0**-11
"""Relative L2 that rounding to fp16 makes at most, if no element is below the smallest normal number."""

MOST_BY_ERROR = 32
"""Nodes with more than the normal error that are tried beside those that overflow: the worst."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found.

    Attributes:
        names: first outputs of the nodes with which the case passes, in the order of the graph; None: no list was
            found.
        tried: nodes of the longest list that was tried.
        trials: how many lists were tried.
        smallest: no node of the list can be left out; False if the trials ran out before that was known.
    """

    names: tuple[str, ...] | None
    tried: tuple[str, ...]
    trials: int
    smallest: bool = False


class _TrialsRanOutError(Exception):
    """No further list may be tried."""


def starting_lists(audit: RangeAudit) -> list[list[str]]:
    """Return the lists to begin with, shorter ones first: what overflows; then also what rounds or clips badly."""
    beyond = audit.out_of_range()
    poor = [node for node in audit.worst(len(audit.nodes)) if node.error > NORMAL_ERROR and node.output not in beyond]
    chosen = {*beyond, *(node.output for node in poor[:MOST_BY_ERROR])}
    chosen |= {node.output for node in audit.nodes if node.reads_clipped}
    wider = [node.output for node in audit.nodes if node.output in chosen]
    return [names for names in ([beyond, wider] if wider != beyond else [beyond]) if names]


def search(
    starts: Sequence[Sequence[str]], passes: Callable[[Sequence[str]], bool], most_trials: int = MOST_TRIALS
) -> Search:
    """Return the smallest list that can be reached by leaving out halves, quarters and at last single nodes.

    Args:
        starts: lists to begin with, shorter ones first; the first that passes is made smaller.
        passes: compiles the case with a list, and judges it.
        most_trials: how often it may be called.

    Examples:
        >>> search([["a", "b", "c", "d"]], lambda names: "c" in names).names
        ('c',)
    """
    failed: set[tuple[str, ...]] = set()
    trials = 0

    def judged(names: Sequence[str]) -> bool:
        nonlocal trials
        if tuple(names) in failed:
            return False
        if trials == most_trials:
            raise _TrialsRanOutError
        trials += 1
        passed = passes(names)
        if not passed:
            failed.add(tuple(names))
        return passed

    best: list[str] | None = None
    longest = tuple(starts[-1]) if starts else ()
    try:
        best = next((list(start) for start in starts if judged(start)), None)
        if best is None:
            return Search(None, longest, trials)
        longest = tuple(best)
        size = len(best) // 2
        while size:
            shorter = False
            at = 0
            while at < len(best):
                rest = best[:at] + best[at + size :]
                if rest and judged(rest):
                    best, shorter = rest, True
                else:
                    at += size
            if size > 1 or not shorter:
                size //= 2
    except _TrialsRanOutError:
        return Search(None if best is None else tuple(best), longest, trials)
    return Search(tuple(best), longest, trials, smallest=True)
