# SPDX-License-Identifier: Apache-2.0
"""Two reports compared: what became worse or better, what is new, and what is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qeff_validate.report.baseline import bounds_of, value_changes, values_of
from qeff_validate.report.html_pages import render
from qeff_validate.report.html_report import TONES
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result, finite
from qeff_validate.report.text import flat, runtime_name, status_word, unsettled_places
from qeff_validate.report.timings import is_timing

SCHEMA = 1

SEVERITY: Mapping[str, int] = {"pass": 0, "not_run": 1, "inconclusive": 2, "error": 3, "fail": 4}
"""Order of the statuses, from good to bad."""

_Place = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True)
class ResultChange:
    """A result in two reports.

    Attributes:
        name: case and runtime, and the relation or ``timing`` if it is of one.
        before: the older result; None: there is none.
        after: the later result; None: there is none.
        words: the status words of both, empty where there is no result.
        worse: what became worse, a sentence each.
        better: what became better.
        notes: what else changed.
    """

    name: str
    before: Result | None
    after: Result | None
    words: tuple[str, str]
    worse: tuple[str, ...] = ()
    better: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def new_failure(self) -> bool:
        """True if the later result fails and the older one did not; a failure that the case expects is none."""
        return self.after is not None and _fails(self.after) and (self.before is None or not _fails(self.before))

    @property
    def simulated(self) -> bool:
        """True if one of the results is of a runtime that stands in for hardware."""
        return any(result is not None and result.simulated for result in (self.before, self.after))

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said of the change."""
        return (*self.worse, *self.better, *self.notes)

    def plain(self) -> dict[str, Any]:
        """Return the change as plain data."""
        before, after = self.before, self.after
        return {
            "name": self.name,
            "simulated": self.simulated,
            "before": None if before is None else before.status,
            "after": None if after is None else after.status,
            "new_failure": self.new_failure,
            "worse": list(self.worse),
            "better": list(self.better),
            "notes": list(self.notes),
            "reason": None if after is None else after.reason,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """All results of two reports, by what became of them, and the changes of the environment."""

    worse: tuple[ResultChange, ...]
    better: tuple[ResultChange, ...]
    new: tuple[ResultChange, ...]
    gone: tuple[ResultChange, ...]
    same: tuple[ResultChange, ...]
    environment: tuple[tuple[str, str | None, str | None], ...]
    """Name and both values; None: it is not there."""

    @property
    def groups(self) -> Mapping[str, tuple[ResultChange, ...]]:
        """The changes by what became of the results."""
        return {"worse": self.worse, "better": self.better, "new": self.new, "gone": self.gone, "same": self.same}

    @property
    def new_failures(self) -> tuple[ResultChange, ...]:
        """The results that fail now and did not before."""
        return tuple(change for change in (*self.worse, *self.new) if change.new_failure)

    def exit_code(self) -> int:
        """Return 1 if there is a new failure, else 0."""
        return 1 if self.new_failures else 0

    def plain(self) -> dict[str, Any]:
        """Return the comparison as plain data; non-finite numbers are strings."""
        plain: dict[str, Any] = {
            "schema": SCHEMA,
            **{name: [change.plain() for change in changes] for name, changes in self.groups.items()},
            "new_failures": [change.name for change in self.new_failures],
            "environment": [{"name": name, "before": old, "after": new} for name, old, new in self.environment],
        }
        return {name: finite(value) for name, value in plain.items()}

    def lines(self) -> list[str]:
        """Return the comparison as text: counts, then a line for each change and each sentence about it."""
        lines = [", ".join(f"{len(changes)} {name}" for name, changes in self.groups.items())]
        for group, changes in self.groups.items():
            told = [change for change in changes if group != "same" or change.texts]
            lines += [f"{group}:"] if told else []
            for change in told:
                lines.append(f"  {change.name}: {_arrow(change)}")
                lines += [f"    {text}" for text in change.texts]
        lines += ["environment:"] if self.environment else []
        lines += [f"  {name}: {old or 'none'} -> {new or 'none'}" for name, old, new in self.environment]
        if self.new_failures:
            lines.append(f"New failures: {', '.join(change.name for change in self.new_failures)}.")
        else:
            lines.append("No new failure.")
        return lines


def compare_reports(old: Report, new: Report) -> Comparison:
    """Compare two reports, result by result; values count as `report.baseline.value_changes` counts them.

    Timings are compared by status alone: whether a machine was slower is judged by ``perf --against``.
    """
    before, after = _by_place(old.results), _by_place(new.results)
    settled = unsettled_places(old.results), unsettled_places(new.results)
    groups: dict[str, list[ResultChange]] = {name: [] for name in ("worse", "better", "new", "gone", "same")}
    for place in dict.fromkeys((*after, *before)):
        pair = before.get(place), after.get(place)
        words = tuple(
            "" if result is None else status_word(result, unsettled)
            for result, unsettled in zip(pair, settled, strict=True)
        )
        change = _change(*pair, (words[0], words[1]))
        groups[_group(change)].append(change)
    environments = dict(flat(old.environment)), dict(flat(new.environment))
    names = dict.fromkeys((*environments[0], *environments[1]))
    values = [(name, environments[0].get(name), environments[1].get(name)) for name in names]
    changed = tuple(item for item in values if item[1] != item[2])
    return Comparison(**{name: tuple(changes) for name, changes in groups.items()}, environment=changed)


def html_comparison(comparison: Comparison, titles: tuple[str, str]) -> str:
    """Return a comparison as one HTML page.

    Args:
        comparison: of two reports.
        titles: what the older and the later report are called, such as their paths.
    """
    pieces = render(
        "compare.html.j2", title="Reports compared", comparison=comparison, titles=titles, tones=TONES, arrow=_arrow
    )
    return "".join(pieces)


def _by_place(results: Iterable[Result]) -> dict[_Place, Result]:
    """Return results by case, runtime and what was judged; several of one kind are numbered."""
    counts: Counter[tuple[str, str, str]] = Counter()
    places: dict[_Place, Result] = {}
    for result in results:
        kind = "timing" if is_timing(result) else str(result.stage) if result.reference == "itself" else ""
        counts[result.case, result.runtime, kind] += 1
        places[result.case, result.runtime, kind, counts[result.case, result.runtime, kind]] = result
    return places


def _change(before: Result | None, after: Result | None, words: tuple[str, str]) -> ResultChange:
    result = after or before
    assert result is not None
    kind = ", timing" if is_timing(result) else f", {result.stage}" if result.reference == "itself" else ""
    name = f"{result.case}-{runtime_name(result)}{kind}"
    if before is None or after is None:
        return ResultChange(name, before, after, words, notes=(after.reason,) if after and after.reason else ())
    worse, better, notes = list[str](), list[str](), list[str]()
    rank = [(_fails(item), SEVERITY[item.status]) for item in (before, after)]
    if rank[0] != rank[1]:
        into = worse if rank[1] > rank[0] else better
        into.append(
            f"it was {_status(before)}, and is {_status(after)} now" + (f": {after.reason}" * bool(after.reason))
        )
    if before.precision != after.precision and None not in (before.precision, after.precision):
        notes.append(f"it was of precision {before.precision}, and is of {after.precision}: values are not compared")
    elif before.metrics and after.metrics:
        then, now = values_of(before), values_of(after)
        worse += [change.text for change in value_changes(then, now, bounds_of(after))]
        better += [change.reversed.text for change in value_changes(now, then, bounds_of(before))]
    return ResultChange(name, before, after, words, tuple(worse), tuple(better), tuple(notes))


def _group(change: ResultChange) -> str:
    if change.before is None or change.after is None:
        return "new" if change.before is None else "gone"
    return "worse" if change.worse else "better" if change.better else "same"


def _fails(result: Result) -> bool:
    return result.expected is None and result.status in ("fail", "inconclusive", "error")


def _status(result: Result) -> str:
    return f"{result.status} (expected)" if result.expected else result.status


def _arrow(change: ResultChange) -> str:
    return " -> ".join(dict.fromkeys(word for word in change.words if word))
