# SPDX-License-Identifier: Apache-2.0
"""The score of a selftest: kill rates by stage, class and metric, survivors, false alarms, and other checkers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qeff_validate.selftest.run import GOALS, STAGES, Alarm, Outcome, Stage

TITLES: Mapping[str, str] = {"fp32": "float32 (PyTorch, ONNX Runtime)", "device": "device (simulated)"}


@dataclass(frozen=True, slots=True)
class Score:
    """All outcomes of outcome config's selftest.

    Attributes:
        title: name of the config.
        outcomes: of mutants.
        alarms: of legitimate runs.
    """

    title: str
    outcomes: tuple[Outcome, ...]
    alarms: tuple[Alarm, ...]

    def rate(self, stage: str) -> float:
        """Return the share of the mutants above the noise that were caught; NaN if there was none."""
        counted = self._counted(stage)
        return sum(outcome.verdict == "caught" for outcome in counted) / len(counted) if counted else float("nan")

    def _counted(self, stage: str) -> list[Outcome]:
        of_stage = [outcome for outcome in self.outcomes if outcome.stage == stage]
        return [outcome for outcome in of_stage if outcome.verdict in ("caught", "survived")]

    def stages(self) -> list[Stage]:
        """Return the stages that took part."""
        return [stage for stage in STAGES if any(outcome.stage == stage for outcome in self.outcomes)]

    def shortfalls(self) -> list[str]:
        """Return a sentence for each goal that was not reached: kill rates, and no false alarm."""
        rates = [
            f"{TITLES[stage]}: {self.rate(stage):.1%} of the mutants were caught, the goal is {GOALS[stage]:.0%}"
            for stage in self.stages()
            if not self.rate(stage) >= GOALS[stage]
        ]
        false = [alarm for alarm in self.alarms if alarm.false]
        return [*rates, *([f"{len(false)} of {len(self.alarms)} legitimate runs were called faulty"] if false else [])]

    def plain(self) -> dict[str, Any]:
        """Return the score as selftest.json holds it."""
        rates = {stage: self.rate(stage) for stage in self.stages()}
        false = sum(alarm.false for alarm in self.alarms)
        summary = {"rates": rates, "legitimate": len(self.alarms), "false_alarms": false}
        return {
            "schema": 1,
            "title": self.title,
            "summary": summary,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "legitimate": [asdict(alarm) for alarm in self.alarms],
        }

    def tables(self) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
        """Yield tables: title, heading, rows."""
        others = list(dict.fromkeys(title for outcome in self.outcomes for title in outcome.others))
        yield (
            "Mutants",
            ("stage", "no noise", "caught", "share", *others),
            [self._row(s, others) for s in self.stages()],
        )
        yield (
            "Legitimate runs that were called faulty",
            ("stage", "runs", "ours", "inconclusive", *others),
            [self._alarms(stage, others) for stage in self.stages()] if self.alarms else [],
        )
        stages = self.stages()
        families = list(dict.fromkeys(outcome.family for outcome in self.outcomes))
        rows: list[Sequence[str]] = [(name, *(self._share(stage, name) for stage in stages)) for name in families]
        yield "By class", ("class", *stages), rows
        caught = [(outcome.stage, set(outcome.gates)) for outcome in self.outcomes if outcome.verdict == "caught"]
        metrics = Counter((gate, stage) for stage, gates in caught for gate in gates)
        alone = Counter((next(iter(gates)), stage) for stage, gates in caught if len(gates) == 1)
        names = [name for name, _ in Counter(name for name, _ in metrics.elements()).most_common()]
        cells: list[Sequence[str]] = [
            (n, *(f"{metrics[n, stage]} ({alone[n, stage]} alone)" for stage in stages)) for n in names
        ]
        yield "By metric", ("metric", *(f"{stage}: mutants beyond it" for stage in stages)), cells

    def survivors(self) -> list[str]:
        """Return a sentence for each mutant above the noise that was not caught."""
        return [
            f"{outcome.stage}, {outcome.case}: {outcome.mutant}: effect {outcome.effect:.2e},"
            f" {outcome.effect / outcome.floor:.1f} x the floor; {outcome.reason}"
            for outcome in self.outcomes
            if outcome.verdict == "survived"
        ]

    def false_alarms(self) -> list[str]:
        """Return a sentence for each legitimate run that did not pass."""
        return [
            f"{alarm.stage}, {alarm.case}: {alarm.variant}: {alarm.status}: {alarm.reason}"
            for alarm in self.alarms
            if alarm.status != "pass"
        ]

    def _row(self, stage: str, others: Iterable[str]) -> Sequence[str]:
        counted = self._counted(stage)
        caught = sum(outcome.verdict == "caught" for outcome in counted)
        by_others = [sum(not outcome.others.get(name, False) for outcome in counted) for name in others]
        shares = [_percent(count, len(counted)) for count in by_others]
        return (TITLES[stage], str(len(counted)), str(caught), _percent(caught, len(counted)), *shares)

    def _alarms(self, stage: str, others: Iterable[str]) -> Sequence[str]:
        runs = [alarm for alarm in self.alarms if alarm.stage == stage]
        counts = [sum(not run.others.get(name, False) for run in runs) for name in others]
        inconclusive = sum(run.status == "inconclusive" for run in runs)
        false = sum(run.false for run in runs)
        return (TITLES[stage], str(len(runs)), str(false), str(inconclusive), *map(str, counts))

    def _share(self, stage: str, family: str) -> str:
        counted = [outcome for outcome in self._counted(stage) if outcome.family == family]
        caught = sum(outcome.verdict == "caught" for outcome in counted)
        return f"{caught}/{len(counted)}" if counted else "none"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def markdown(score: Score) -> str:
    """Return a score as a section of docs/power.md."""
    cases = ", ".join(dict.fromkeys(outcome.case for outcome in score.outcomes))
    kinds: Counter[tuple[str, str]] = Counter((outcome.stage, outcome.verdict) for outcome in score.outcomes)
    lines = [f"## {score.title}", "", f"Mutants of the cases {cases}."]
    lines += [
        f"{TITLES[stage]}: {kinds[stage, 'equivalent']} equivalent by rule, {kinds[stage, 'inapplicable']} had nothing"
        " to change."
        for stage in score.stages()
    ]
    for title, head, rows in score.tables():
        if rows:
            lines += ["", f"### {title}", "", _line(head), _line("---" for _ in head), *map(_line, rows)]
    for title, items in (("Survivors", score.survivors()), ("Legitimate runs that did not pass", score.false_alarms())):
        lines += ["", f"### {title}", "", *([f"- {text}" for text in items] or ["None."])]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
