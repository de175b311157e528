# SPDX-License-Identifier: Apache-2.0
"""Positions in the small charts of an HTML report. Lengths are shares of a chart's width or height, 0 to 100."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qeff_validate.comparison.verdict import GateResult
from qeff_validate.report.explanation import Explanation, LayerError

MOST_DECADES = 6
"""Range of an axis on each side of its middle; what lies beyond is drawn at the edge."""


@dataclass(frozen=True, slots=True)
class LogScale:
    """A logarithmic axis from ``low`` to ``high``, both positive."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], middle: float = 1.0) -> LogScale:
        """Return an axis of whole decades that holds a middle and values, as far as `MOST_DECADES` allows."""
        decades = [math.log10(value / middle) for value in values if 0 < value < math.inf]
        low = max(math.floor(min([*decades, -1.0])), -MOST_DECADES)
        high = min(math.ceil(max([*decades, 1.0])), MOST_DECADES)
        return cls(middle * 10.0**low, middle * 10.0**high)

    def at(self, value: float) -> float:
        """Return where a value stands, 0 to 100; NaN stands at the high end."""
        if not value < self.high:
            return 100.0
        if value <= self.low:
            return 0.0
        return round(100 * math.log(value / self.low) / math.log(self.high / self.low), 2)


@dataclass(frozen=True, slots=True)
class BoundMark:
    """Where the value and the floor of a metric stand beside its bound."""

    value: float
    floor: float | None
    bound: float


def bound_scale(gates: Iterable[GateResult]) -> LogScale:
    """Return the axis on which the metrics of a result are drawn: value over bound, so that all bounds are at 1."""
    ratios = []
    for item in gates:
        if item.bound is not None and item.bound.value > 0:
            ratios += [item.metric.value / item.bound.value, (item.bound.floor or 0) / item.bound.value]
    return LogScale.around(ratios)


def bound_mark(item: GateResult, scale: LogScale) -> BoundMark | None:
    """Return the marks of a metric on the axis of `bound_scale`; None if its bound is zero, or it has none."""
    if item.bound is None or not item.bound.value > 0:
        return None
    bound = item.bound
    floor = scale.at(bound.floor / bound.value) if bound.floor else None
    return BoundMark(scale.at(item.metric.value / bound.value), floor, scale.at(1.0))


@dataclass(frozen=True, slots=True)
class Strip:
    """Bars of an error strip as vertical lines of SVG paths, in a box ``width`` by 100, y downwards.

    Attributes:
        width: number of bars.
        within: path of the bars within the bound.
        beyond: path of the other bars.
        missing: path of the places without an error.
        bound: height of the bound; None: it is zero.
        floor: height of the floor; None: it was not measured.
        worst: index of the greatest error.
        values: the errors; None: not measured.
    """

    width: int
    within: str
    beyond: str
    missing: str
    bound: float | None
    floor: float | None
    worst: int
    values: list[float | None]


def strip(item: GateResult) -> Strip | None:
    """Return the errors of a metric by row on a log scale; None if there are none."""
    errors = item.metric.by_row
    if errors is None or item.bound is None or not len(errors.values):
        return None
    limit = item.bound.value
    positive = sorted(value for value in (*errors.values, limit) if 0 < value < math.inf)
    low, high = (positive[0] / 2, positive[-1] * 1.5) if positive else (0.5, 1.5)
    scale = LogScale(max(low, high * 10.0**-MOST_DECADES), high)
    paths: dict[str, list[str]] = {"within": [], "beyond": [], "missing": []}
    for place, value in enumerate(errors.values):
        if math.isnan(value):
            paths["missing"].append(f"M{place}.5 100V0")
        else:
            height = max(scale.at(value), 2.0)  # a row without an error is there, too
            paths["within" if value <= limit else "beyond"].append(f"M{place}.5 100V{100 - height:.3g}")
    known = [(-1.0 if math.isnan(value) else value) for value in errors.values]
    return Strip(
        width=len(errors.values),
        **{name: "".join(parts) for name, parts in paths.items()},
        bound=100 - scale.at(limit) if limit > 0 else None,
        floor=100 - scale.at(item.bound.floor) if item.bound.floor else None,
        worst=known.index(max(known)),
        values=[None if math.isnan(value) else value for value in errors.values],
    )


@dataclass(frozen=True, slots=True)
class StageBar:
    """A stage's share of the error, which is negative where it cancels other stages' error."""

    name: str
    share: float
    error: float
    start: float
    width: float
    named: bool


def stage_bars(explanation: Explanation) -> tuple[float, list[StageBar]]:
    """Return where the share 0 stands, and the bars of an explanation's stages."""
    known = [stage.share for stage in explanation.stages if math.isfinite(stage.share)]
    low, high = min([0.0, *known]), max([1.0, *known])

    def at(share: float) -> float:
        return 100 * (share - low) / (high - low) if math.isfinite(share) else 0.0

    bars = []
    for stage in explanation.stages:
        start, end = sorted((at(0.0), at(stage.share) if math.isfinite(stage.share) else at(0.0)))
        named = stage.name == explanation.stage
        bars.append(StageBar(stage.name, stage.share, stage.error, start, max(end - start, 0.4), named))
    return at(0.0), bars


@dataclass(frozen=True, slots=True)
class LayerBar:
    """A layer of the waterfall: the error that it inherits, and the one that it makes itself."""

    layer: LayerError
    inherited_at: float
    local_at: float
    floor_at: float | None
    named: bool


def layer_bars(explanation: Explanation) -> list[LayerBar]:
    """Return the bars of an explanation's layers, on one log scale."""
    values = [value for layer in explanation.layers for value in (layer.inherited, layer.local, layer.floor)]
    positive = [value for value in values if 0 < value < math.inf]
    high = max(positive, default=1.0) * 1.2
    scale = LogScale(max(min(positive, default=0.1) / 2, high * 10.0 ** -(2 * MOST_DECADES)), high)
    return [
        LayerBar(
            layer=layer,
            inherited_at=0.0 if math.isnan(layer.inherited) else scale.at(layer.inherited),
            local_at=scale.at(layer.local),
            floor_at=scale.at(layer.floor) if layer.floor > 0 else None,
            named=bool(layer.module) and layer.module == explanation.module,
        )
        for layer in explanation.layers
    ]
