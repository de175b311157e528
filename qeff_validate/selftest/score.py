# SPDX-License-Identifier: Apache-2.0
"""What a selftest found, counted: kill rates by stage, class and metric, survivors, false alarms, and other checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qeff_validate.selftest.run import GOALS, STAGES, Alarm, Outcome, Stage

TITLES: Mapping[str, str] = {"fp32": "float32 (PyTorch, ONNX Runtime)", "device": "device (simulated)"}


@dataclass(frozen=True, slots=True)
class Score:
    """All outcomes of one config's selftest.

    Attributes:
        title: what was tested.
        outcomes: of mutants.
        alarms: of legitimate runs.
    """

    title: str
    outcomes: tuple[Outcome, ...]
    alarms: tuple[Alarm, ...]

    def rate(self, stage: str) -> float:
        """Return which share of the mutants that are no noise was caught; NaN if there was none."""
        some = self._counted(stage)
        return sum(one.verdict == "caught" for one in some) / len(some) if some else float("nan")

    def _counted(self, stage: str) -> list[Outcome]:
        return [one for one in self.outcomes if one.stage == stage and one.verdict in ("caught", "survived")]

    def stages(self) -> list[Stage]:
        """Return the stages that took part."""
        return [stage for stage in STAGES if any(one.stage == stage for one in self.outcomes)]

    def shortfalls(self) -> list[str]:
        """Say what was not reached: a kill rate, or silence on legitimate runs."""
        found = [
            f"{TITLES[stage]}: {self.rate(stage):.1%} of the mutants were caught, the goal is {GOALS[stage]:.0%}"
            for stage in self.stages()
            if not self.rate(stage) >= GOALS[stage]
        ]
        false = [alarm for alarm in self.alarms if alarm.false]
        return [*found, *([f"{len(false)} of {len(self.alarms)} legitimate runs were called faulty"] if false else [])]

    def plain(self) -> dict[str, Any]:
        """Return it as selftest.json holds it."""
        rates = {stage: self.rate(stage) for stage in self.stages()}
        false = sum(alarm.false for alarm in self.alarms)
        summary = {"rates": rates, "legitimate": len(self.alarms), "false_alarms": false}
        return {
            "schema": 1,
            "title": self.title,
            "summary": summary,
            "outcomes": [asdict(one) for one in self.outcomes],
            "legitimate": [asdict(one) for one in self.alarms],
        }

    def tables(self) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
        """Yield tables: title, heading, rows."""
        others = list(dict.fromkeys(title for one in self.outcomes for title in one.others))
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
        families = list(dict.fromkeys(one.family for one in self.outcomes))
        rows: list[Sequence[str]] = [(name, *(self._share(stage, name) for stage in stages)) for name in families]
        yield "By class", ("class", *stages), rows
        metrics = Counter(
            (gate, one.stage) for one in self.outcomes if one.verdict == "caught" for gate in set(one.gates)
        )
        alone = Counter(
            (one.gates[0], one.stage) for one in self.outcomes if one.verdict == "caught" and len(set(one.gates)) == 1
        )
        names = [name for name, _ in Counter(name for name, _ in metrics.elements()).most_common()]
        cells: list[Sequence[str]] = [
            (n, *(f"{metrics[n, stage]} ({alone[n, stage]} alone)" for stage in stages)) for n in names
        ]
        yield "By metric", ("metric", *(f"{stage}: mutants beyond it" for stage in stages)), cells

    def survivors(self) -> list[str]:
        """Say of each mutant that was not caught, and is no noise, what came of it."""
        return [
            f"{one.stage}, {one.case}: {one.mutant}: effect {one.effect:.2e}, {one.effect / one.floor:.1f} x the floor;"
            f" {one.reason}"
            for one in self.outcomes
            if one.verdict == "survived"
        ]

    def false_alarms(self) -> list[str]:
        """Say of each legitimate run that did not pass what came of it."""
        return [
            f"{one.stage}, {one.case}: {one.variant}: {one.status}: {one.reason}"
            for one in self.alarms
            if one.status != "pass"
        ]

    def _row(self, stage: str, others: Iterable[str]) -> Sequence[str]:
        some = self._counted(stage)
        caught = sum(one.verdict == "caught" for one in some)
        shares = [_percent(sum(not one.others.get(name, False) for one in some), len(some)) for name in others]
        return (TITLES[stage], str(len(some)), str(caught), _percent(caught, len(some)), *shares)

    def _alarms(self, stage: str, others: Iterable[str]) -> Sequence[str]:
        some = [alarm for alarm in self.alarms if alarm.stage == stage]
        counts = [sum(not alarm.others.get(name, False) for alarm in some) for name in others]
        unsure = sum(alarm.status == "inconclusive" for alarm in some)
        return (TITLES[stage], str(len(some)), str(sum(a.false for a in some)), str(unsure), *map(str, counts))

    def _share(self, stage: str, family: str) -> str:
        some = [one for one in self._counted(stage) if one.family == family]
        return f"{sum(one.verdict == 'caught' for one in some)}/{len(some)}" if some else "none"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def markdown(score: Score) -> str:
    """Return a score as a section of docs/power.md."""
    cases = ", ".join(dict.fromkeys(one.case for one in score.outcomes))
    kinds: Counter[tuple[str, str]] = Counter((one.stage, one.verdict) for one in score.outcomes)
    lines = [f"## {score.title}", "", f"Mutants of the cases {cases}."]
    lines += [
        f"{TITLES[stage]}: {kinds[stage, 'equivalent']} equivalent by rule, {kinds[stage, 'inapplicable']} had nothing"
        " to change."
        for stage in score.stages()
    ]
    for title, head, rows in score.tables():
        if rows:
            lines += ["", f"### {title}", "", _line(head), _line("---" for _ in head), *map(_line, rows)]
    for title, found in (("Survivors", score.survivors()), ("Legitimate runs that did not pass", score.false_alarms())):
        lines += ["", f"### {title}", "", *([f"- {text}" for text in found] or ["None."])]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
