# SPDX-License-Identifier: Apache-2.0
"""The result of a case on a runtime, and its plain form in report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, get_args

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import ErrorsByRow, Metric
from qeff_validate.comparison.task_metrics import TaskScore
from qeff_validate.comparison.verdict import GateResult, Power, RowText, Status
from qeff_validate.errors import IncomparableError
from qeff_validate.report.explanation import Explanation


@dataclass(frozen=True, slots=True)
class Precheck:
    """One precheck: whether both sides of a comparison were made from the same thing.

    Attributes:
        name: one of `prechecks.checks.PRECHECKS`.
        state: ``differs`` only where that is certain.
        detail: both sides if they differ, why if it is unknown, a remark if it is the same.
        suspect: unknown, but worth a look if the numbers do not agree.
    """

    name: str
    state: Literal["same", "differs", "unknown"]
    detail: str = ""
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What came out for one case on one runtime.

    Examples:
        >>> result = Result("small", "ai100", "not_run", reason="no AI 100 SDK")
        >>> result.plain()["coverage"]
        {'planned': 0, 'compared': 0}
    """

    case: str
    runtime: str
    status: Status
    reason: str = ""
    stage: str | None = None
    reference: str = "hf"
    precision: str | None = None
    simulated: bool = False
    metrics: tuple[GateResult, ...] = ()
    planned: int = 0
    compared: int = 0
    timings_s: Mapping[str, float] = field(default_factory=dict)
    artifact: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    expected: str | None = None
    power: Power | None = None
    prechecks: tuple[Precheck, ...] = ()
    performance: Mapping[str, Any] | None = None
    """Timings as distributions, costs, machine and judgements, of `pipeline.performance`; None of other results."""
    texts: tuple[RowText, ...] = ()
    """The texts of the rows that `Metric.by_row` has the errors of; empty: only those of the worst rows are known."""
    explanation: Explanation | None = None
    """Where a failure comes from; None: it was not looked for."""
    task: TaskScore | None = None
    """What the outputs reach on the case's task data; None without such data. The status does not depend on it."""

    def plain(self) -> dict[str, Any]:
        """Return the result as report.json holds it; non-finite numbers are strings."""
        plain: dict[str, Any] = {
            "case": self.case,
            "runtime": self.runtime,
            "reference": self.reference,
            "precision": self.precision,
            "simulated": self.simulated,
            "status": self.status,
            "reason": self.reason,
            "stage": self.stage,
            "metrics": [_metric(item) for item in self.metrics],
            "coverage": {"planned": self.planned, "compared": self.compared},
            "timings_s": dict(self.timings_s),
            "artifact": dict(self.artifact) if self.artifact is not None else None,
            "notes": list(self.notes),
            "findings": list(self.findings),
            "expected": self.expected,
            "power": None if self.power is None else _power(self.power),
            "prechecks": [
                {"name": precheck.name, "state": precheck.state, "detail": precheck.detail}
                for precheck in self.prechecks
            ],
        }
        if self.performance is not None:
            plain["performance"] = dict(self.performance)
        if self.texts:
            plain["texts"] = [{"text": item.text, "rows": item.rows} for item in self.texts]
        if self.task is not None:
            plain["task"] = self.task.plain()
        if self.explanation is not None:
            plain["explanation"] = self.explanation.to_plain()
        return {key: finite(value) for key, value in plain.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Result:
        """Return the result that `plain` describes; names of gross faults and suspect prechecks are not kept.

        Raises:
            IncomparableError: a value is missing or of another type.
        """
        try:
            same = {item.name: plain[item.name] for item in fields(cls) if item.name in plain}
            if plain["status"] not in get_args(Status):
                raise ValueError(f"status {plain['status']!r}")
            _check_types(plain)
            power, explanation, task = plain["power"], plain.get("explanation"), plain.get("task")
            return cls(
                **{
                    **same,
                    **plain["coverage"],
                    "metrics": tuple(map(_gate_result, plain["metrics"])),
                    "notes": tuple(plain["notes"]),
                    "findings": tuple(plain["findings"]),
                    "power": None if power is None else Power(power["tried"], tuple(power["missed"])),
                    "prechecks": tuple(Precheck(**item) for item in plain["prechecks"]),
                    "texts": tuple(RowText(item["text"], item["rows"]) for item in plain.get("texts", ())),
                    "explanation": None if explanation is None else Explanation.from_plain(explanation),
                    "task": None if task is None else TaskScore.from_plain(task),
                }
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise IncomparableError(f"no result of report.json: {type(exc).__name__}: {exc}") from exc

    @property
    def gates(self) -> tuple[GateResult, ...]:
        """The metrics with a bound."""
        return tuple(item for item in self.metrics if item.bound is not None)


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("case", "runtime", "reason", "reference"), (str,)),
    **dict.fromkeys(("stage", "precision", "expected"), (str, NoneType)),
    "simulated": (bool,),
    **dict.fromkeys(("coverage", "timings_s"), (dict,)),
    **dict.fromkeys(("artifact", "power", "performance", "explanation", "task"), (dict, NoneType)),
    **dict.fromkeys(("metrics", "notes", "findings", "prechecks", "texts"), (list,)),
}


def _check_types(plain: Mapping[str, Any]) -> None:
    """Raise a TypeError if a value of a plain result, which may come from a file, is of another type."""
    for name, types in _TYPES.items():
        if name in plain and not isinstance(plain[name], types):
            raise TypeError(f"{name} is of type {type(plain[name]).__name__}")
    if not all(isinstance(text, str) for name in ("notes", "findings") for text in plain[name]):
        raise TypeError("a note or finding is no text")
    if not all(isinstance(plain["coverage"][name], int) for name in ("planned", "compared")):
        raise TypeError("coverage holds no numbers of rows")


def _power(power: Power) -> dict[str, Any]:
    caught = power.tried - len(power.missed)
    share = caught / power.tried if power.tried else None
    return {"tried": power.tried, "caught": caught, "share": share, "missed": list(power.missed)}


def _metric(item: GateResult) -> dict[str, Any]:
    bound = item.bound
    by_row = item.metric.by_row.bounded() if item.metric.by_row and bound else None
    plain = {
        "name": item.metric.name,
        "value": item.metric.value,
        "bound": bound.value if bound else None,
        "source": bound.source if bound else None,
        "why": bound.why if bound else None,
        "floor": bound.floor if bound else None,
        "over_bound": item.metric.value / bound.value if bound and bound.value else None,
        "over_floor": item.metric.value / bound.floor if bound and bound.floor else None,
        "worst": dict(item.metric.worst),
        "passed": item.passed,
    }
    if by_row is not None:
        plain["by_row"] = {"errors": [float(f"{x:.3g}") for x in by_row.values], "rows_each": by_row.rows_each}
    return plain


def _gate_result(plain: Mapping[str, Any]) -> GateResult:
    bound = None
    if plain["bound"] is not None:
        floor = None if plain["floor"] is None else float(plain["floor"])
        bound = Bound(float(plain["bound"]), plain["source"], plain["why"], floor)
    if not isinstance(plain["name"], str) or not isinstance(plain["worst"], dict):
        raise TypeError(f"metric {plain['name']!r}: its name is no text, or its worst row no mapping")
    by_row = plain.get("by_row")
    if by_row is not None:
        by_row = ErrorsByRow(tuple(map(float, by_row["errors"])), int(by_row["rows_each"]))
    return GateResult(Metric(plain["name"], float(plain["value"]), plain["worst"], by_row), bound)


def finite(value: Any) -> Any:
    """Return plain data with non-finite numbers as the strings nan, inf and -inf, which JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
