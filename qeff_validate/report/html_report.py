# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page, from what report.json holds alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qeff_validate.comparison.verdict import GateResult
from qeff_validate.report.charts import (
    BoundMark,
    LayerBar,
    LogScale,
    StageBar,
    Strip,
    bound_mark,
    bound_scale,
    layer_bars,
    stage_bars,
    strip,
)
from qeff_validate.report.html_pages import render
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result
from qeff_validate.report.text import (
    DISPROVED,
    HELD,
    NOT_PROVED,
    NOT_RUN,
    NOT_SETTLED,
    PROVED,
    flat,
    nearness,
    runtime_name,
    status_word,
    unsettled_places,
)
from qeff_validate.report.timings import HEAD as TIMING_HEAD
from qeff_validate.report.timings import IN_TIME, NOT_IN_TIME, is_timing, timing_lines, timing_rows

TONES: Mapping[str, tuple[str, str]] = {
    DISPROVED: ("bad", "✗"),
    NOT_IN_TIME: ("bad", "✗"),
    NOT_SETTLED: ("open", "?"),
    NOT_PROVED: ("open", "≈"),
    NOT_RUN: ("none", "–"),
    PROVED: ("good", "✓"),
    HELD: ("good", "✓"),
    IN_TIME: ("good", "✓"),
}
"""Colour and sign of each status word; the words come first, so that colour is never all that tells."""

OPENED = 3
"""Number of disproved results whose details are open at first."""

NAMED_ROWS = 5
"""Number of worst rows that are listed with their texts."""


@dataclass(frozen=True, slots=True)
class MetricView:
    """A metric of a result as the page shows it."""

    gate: GateResult
    output: str
    label: str
    mark: BoundMark | None
    strip: Strip | None

    @property
    def times_bound(self) -> float | None:
        """Value over bound; None if the bound is zero, or there is none."""
        return _times_bound(self.gate)


@dataclass(frozen=True, slots=True)
class ResultHead:
    """What the overview and the details of a result begin with.

    Attributes:
        number: on the page, from 1.
        word: its status word.
        kind: what was judged, where it is not the agreement with the original model; else empty.
        times_bound: value over bound of the metric that failed, or came nearest to its bound; None if there is none.
    """

    number: int
    case: str
    runtime: str
    word: str
    kind: str
    expected: bool
    simulated: bool
    times_bound: float | None

    @property
    def tone(self) -> str:
        """Name of the colour of the status word."""
        return TONES[self.word][0]

    @property
    def sign(self) -> str:
        """Sign of the status word."""
        return TONES[self.word][1]


@dataclass(frozen=True, slots=True)
class ResultView:
    """A result as the page shows it."""

    head: ResultHead
    result: Result
    opened: bool
    gates: list[MetricView]
    others: list[MetricView]
    scale: LogScale

    @property
    def searched(self) -> str:
        """The text that the search of the page looks in, in small letters."""
        result = self.result
        named = result.explanation
        head = self.head
        parts = [result.case, head.runtime, head.word, result.status, result.precision, head.kind, result.reason]
        parts += [*result.findings, *result.notes, *((named.summary, named.module) if named else ())]
        return " ".join(str(part) for part in parts if part).lower()

    @property
    def spans(self) -> list[list[Any]]:
        """Texts of the rows, each with its number of rows; of the worst rows alone if no others are known."""
        return [[item.text, item.rows] for item in self.result.texts]

    @property
    def worst_rows(self) -> list[tuple[str, str, float, bool]]:
        """Place, text and value of the worst rows by the nearest metric that has errors by row; True: beyond it."""
        views = [view for view in self.gates if view.strip is not None]
        view = max(views, key=lambda item: nearness(item.gate), default=None)
        if view is None or view.strip is None or view.gate.bound is None or view.gate.metric.by_row is None:
            return []
        each, values = view.gate.metric.by_row.rows_each, view.strip.values
        order = sorted((place for place, value in enumerate(values) if value), key=lambda at: -(values[at] or 0))
        rows = []
        for place in order[:NAMED_ROWS]:
            value = values[place] or 0.0
            name = f"{place}" if each == 1 else f"{place * each}–{place * each + each - 1}"
            text = self.text_of(place) if each == 1 else ""
            rows.append((name, text, value, not value <= view.gate.bound.value))
        return rows

    @property
    def worst_rows_of(self) -> str:
        """Label of the metric that `worst_rows` are of."""
        views = [view for view in self.gates if view.strip is not None]
        return max(views, key=lambda item: nearness(item.gate)).label if views else ""

    def text_of(self, row: int) -> str:
        """Return the text of a row; empty if it is not known."""
        start = 0
        for item in self.result.texts:
            if row < start + item.rows:
                return item.text if item.rows == 1 else f"{item.text} +{row - start}"
            start += item.rows
        known = [item.metric.worst for item in self.result.metrics]
        return next((str(worst.get("text", "")) for worst in known if worst.get("row") == row), "")

    @property
    def stages(self) -> tuple[float, list[StageBar]]:
        """Where the share 0 stands, and the stages of the explanation."""
        return stage_bars(self.result.explanation) if self.result.explanation else (0.0, [])

    @property
    def layers(self) -> list[LayerBar]:
        """The layers of the explanation."""
        return layer_bars(self.result.explanation) if self.result.explanation else []

    @property
    def workloads(self) -> list[tuple[str, ...]]:
        """Cells of the timed workloads, without case and runtime."""
        return [cells[2:] for cells in timing_rows([self.result])]

    @property
    def timing_lines(self) -> list[str]:
        """Costs and judgements of timings."""
        return [line.partition(": ")[2] for line in timing_lines([self.result])]


class _Views:
    """The results as the page shows them; one at a time is in memory, made from what report.json holds."""

    def __init__(self, heads: Sequence[ResultHead], results: Sequence[Result]) -> None:
        self._heads, self._results = heads, results

    def __len__(self) -> int:
        return len(self._heads)

    def __iter__(self) -> Iterator[ResultView]:
        opened = 0
        for head, held in zip(self._heads, self._results, strict=True):
            result = Result.from_plain(held.plain())
            scale = bound_scale(result.gates)
            metrics = [_metric_view(item, scale) for item in result.metrics]
            gates = [view for view in metrics if view.gate.bound is not None]
            others = [view for view in metrics if view.gate.bound is None]
            open_now = head.word == DISPROVED and opened < OPENED
            opened += open_now
            yield ResultView(head, result, open_now, gates, others, scale)


def html_report(report: Report) -> Iterator[str]:
    """Return the content of report.html in pieces: what report.json holds decides it, and nothing else."""
    heads = list(_heads(report.results))
    words, runtimes = Counter(head.word for head in heads), Counter(head.runtime for head in heads)
    return render(
        "report.html.j2",
        title="Validation report",
        views=_Views(heads, report.results),
        words=[(word, TONES[word], words[word]) for word in TONES if words[word]],
        runtimes=list(runtimes.items()),
        matrix=_matrix(heads, runtimes),
        closing=sorted(map(_sentence, report.closing()), key=lambda sentence: sentence[0] != "bad"),
        unwritten=report.unwritten,
        environment=list(flat(report.environment)),
        rows_compared=report.rows_compared,
        timing_head=TIMING_HEAD[2:],
        simulated=any(head.simulated for head in heads),
        plural=_plural,
    )


def _heads(results: Sequence[Result]) -> Iterator[ResultHead]:
    unsettled = unsettled_places(results)
    for number, result in enumerate(results, start=1):
        nearest = max(result.gates, key=nearness, default=None)
        kind = f"relation {result.stage}" if result.reference == "itself" else ""
        yield ResultHead(
            number,
            result.case,
            runtime_name(result),
            status_word(result, unsettled),
            "timing" if is_timing(result) else kind,
            bool(result.expected),
            result.simulated,
            None if nearest is None else _times_bound(nearest),
        )


def _times_bound(gate: GateResult) -> float | None:
    """Return value over bound; None if the bound is zero, or there is none."""
    bound = gate.bound
    return gate.metric.value / bound.value if bound and bound.value > 0 else None


def _metric_view(item: GateResult, scale: LogScale) -> MetricView:
    output, _, name = item.metric.label.rpartition(".")
    return MetricView(item, output, name, bound_mark(item, scale), strip(item))


def _matrix(heads: Iterable[ResultHead], runtimes: Collection[str]) -> list[tuple[str, list[list[ResultHead]]]]:
    """Return the results of each case by runtime."""
    cells: dict[str, dict[str, list[ResultHead]]] = {}
    for head in heads:
        cells.setdefault(head.case, {}).setdefault(head.runtime, []).append(head)
    return [(case, [of_case.get(name, []) for name in runtimes]) for case, of_case in cells.items()]


def _sentence(line: str) -> tuple[str, str, str]:
    """Return the colour of a closing sentence, its word, and the rest."""
    word, _, rest = line.partition(": ")
    return TONES.get(word, ("none", ""))[0], word, rest


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
