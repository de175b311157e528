# SPDX-License-Identifier: Apache-2.0
"""Bounds of metrics: measured, set by the case, or from the table, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from qeff_validate.comparison.metric import (
    SYSTEMATIC_METRICS,
    VECTOR_METRICS,
    MetricSpec,
    least_bounds,
    most_bounds,
    table_bounds,
)
from qeff_validate.comparison.noise_floor import Floor, factor, limit
from qeff_validate.errors import ConfigError, IncomparableError, suggest

NOT_METRICS = ("why", "accept_low_power")
"""Keys of a tolerance that hold reasons."""

PRECISIONS = ("fp32", "fp16", "bf16")
"""Compute precisions of the table. The noise of compressed weights and state is measured by emulation."""

FALLBACK: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {precision: table_bounds(VECTOR_METRICS, precision) for precision in PRECISIONS}
)
"""Bounds of vectors by precision."""

LEAST: Mapping[str, float] = MappingProxyType(least_bounds(VECTOR_METRICS))
"""Lower limits of measured bounds of vectors."""

MOST: Mapping[str, float] = MappingProxyType(most_bounds(VECTOR_METRICS))
"""Exclusive upper limits of the bounds of vectors."""

SYSTEMATIC_ERRORS: Mapping[str, float] = MappingProxyType(least_bounds(SYSTEMATIC_METRICS))
"""Metrics of systematic errors, with the lower limit of their bounds."""


SYSTEMATIC_FACTOR = 1.5
"""Multiplies the limit of a systematic error, in addition to the factor of the precision.

The worst of 51 held-out graphs on the simulated device had 1.76 times the limit.
"""


FAR = 20.0
"""Upper limit of a measured bound in float32, as a multiple of the table's: greater errors are not rounding.

A model that draws random numbers would otherwise widen the bound that it is judged by.
"""


NOISE_SHARE = 5.0
"""Ratio of a bound of the table to typical noise (1e-2 to 2e-3 in fp16); used where no floor was measured."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The greatest accepted value of a metric, where it comes from, and why."""

    value: float
    source: Literal["floor", "case", "fallback", "exact"]
    why: str
    floor: float | None = None
    """Typical value over legitimate runs, where it was measured."""

    @property
    def noise(self) -> float:
        """The value that rounding alone is expected to give: the floor of a measured bound, else a share of the bound.

        A bound of the case's own says what is usual for it, whatever was measured.
        """
        return self.value / NOISE_SHARE if self.floor is None or self.source == "case" else self.floor


def check_tolerance(where: str, values: Mapping[str, Any], most: Mapping[str, float] = MOST) -> None:
    """Refuse a tolerance with an unknown metric, without a reason, or with a bound too wide to detect anything.

    Args:
        where: name of the tolerance in error messages.
        values: metric to bound, and ``why``.
        most: the known metrics, each with the exclusive upper limit of its bound.

    Raises:
        ConfigError: an unknown metric, a bound that is NaN, infinite, negative or absurdly wide, or no ``why``.
    """
    for name, value in values.items():
        if name in NOT_METRICS:
            continue
        if name not in most:
            raise ConfigError(f"{where}: no metric is called {name!r}.{suggest(name, most)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < most[name]):
            raise ConfigError(
                f"{where}.{name}: {value!r} is no usable bound: give a number from 0 to below {most[name]:g}"
            )
    check_bounds(where, values)


def check_bounds(where: str, values: Mapping[str, Any]) -> None:
    """Refuse a tolerance that no metric can have, whatever the metrics of the model kind are.

    Raises:
        ConfigError: a bound that is NaN, infinite or negative, or no ``why``.
    """
    bounds = {name: value for name, value in values.items() if name not in NOT_METRICS}
    for name, value in bounds.items():
        if isinstance(value, (int, float)) and not (0 <= value < math.inf):
            raise ConfigError(f"{where}.{name}: {value!r} is no usable bound: give a number from 0")
    low_power = values.get("accept_low_power")
    if low_power is not None and not (isinstance(low_power, str) and low_power.strip()):
        raise ConfigError(f"{where}.accept_low_power: give the reason as a text")
    if bounds and not str(values.get("why") or "").strip():
        raise ConfigError(f"{where}: a bound needs its reason: add why: '…'")


def measured_bound(name: str, floor: Floor, least: float, most: float) -> Bound | None:
    """Return the bound of a metric from the errors of legitimate runs; None if it is not below ``most``.

    Raises:
        IncomparableError: the floor has no errors of this metric.
    """
    if name not in floor.errors:
        raise IncomparableError(f"the noise floor has no errors of the metric {name!r}: measure or record it anew")
    run_limit, multiple = limit(name, floor.errors[name]), factor(floor.profile, name)
    value = nan_max((multiple * run_limit, least))
    if not value < most:
        return None
    runs = len(floor.errors[name])
    why = f"{multiple:g} x {run_limit:.2g}, the 95/95 limit of {runs} legitimate runs in {floor.profile}"
    if floor.left_out:
        why += f", with {floor.left_out} texts estimated from the others"
    return Bound(value, "floor", why, floor.level(name))


def gate_bounds(
    precision: str,
    floor: Floor | None,
    *,
    table: Mapping[str, Mapping[str, float]],
    least: Mapping[str, float],
    most: Mapping[str, float],
) -> dict[str, Bound]:
    """Return bounds from the errors of legitimate runs, or from the table if no errors were measured.

    Args:
        precision: profile of the artifact.
        floor: the errors of legitimate runs; None: not measured.
        table: bounds by precision.
        least: lower limit of each measured bound; its keys are the metrics that get one.
        most: exclusive upper limits.
    """
    if floor is None:
        return {
            name: Bound(value, "fallback", f"{precision} profile") for name, value in table.get(precision, {}).items()
        }
    fp32_limits = {name: FAR * value for name, value in table["fp32"].items()} if floor.profile == "fp32" else {}
    bounds = {
        name: measured_bound(name, floor, value, min(most[name], fp32_limits.get(name, math.inf)))
        for name, value in least.items()
    }
    return {name: bound for name, bound in bounds.items() if bound is not None}


def systematic_bounds(floor: Floor) -> dict[str, Bound]:
    """Return the bounds of systematic errors; a metric whose noise is not finite has none.

    Errors of integers are systematic by themselves: they are the same in each run, and change with the last bits of a
    weight or of a scale. They get no such bounds.
    """
    bounds: dict[str, Bound] = {}
    if any(name.startswith("int") for name in floor.profile.split("+")):
        return bounds
    for name, least in SYSTEMATIC_ERRORS.items():
        if name not in floor.systematic_errors:
            raise IncomparableError(f"the noise floor has no {name!r} of a device: measure or record it anew")
        run_limit, multiple = (
            limit(name, floor.systematic_errors[name]),
            SYSTEMATIC_FACTOR * factor(floor.profile, name),
        )
        if not np.isfinite(run_limit):
            continue
        why = (
            f"{multiple:g} x {run_limit:.2g}, the 95/95 limit of legitimate runs in {floor.profile} against their mean"
        )
        typical = float(np.median(floor.systematic_errors[name]))
        bounds[name] = Bound(nan_max((multiple * run_limit, least)), "floor", why, typical)
    return bounds


def bounds_for(precision: str, *, override: Mapping[str, Any], floor: Floor | None = None) -> dict[str, Bound]:
    """Return the bound of every gate for a precision profile; metrics without a sound bound are left out.

    Args:
        precision: ``fp32``, ``fp16``, ``bf16`` or a profile without fallback such as ``fp16+mxfp6``.
        override: the case's own bounds, with ``why``.
        floor: the errors of legitimate runs; None: bounds come from the table.
    """
    bounds = gate_bounds(precision, floor, table=FALLBACK, least=LEAST, most=MOST)
    bounds |= overridden(override, bounds)
    if bounds:
        exact = Bound(0.0, "exact", "no neighbour moves further than noise allows")
        bounds.setdefault("neighbour_order", exact)
    return bounds


def metric_bounds(
    specs: Sequence[MetricSpec],
    exact: str,
    why: str,
    precision: str,
    *,
    override: Mapping[str, Any],
    floor: Floor | None,
) -> dict[str, Bound]:
    """Return the bounds of a kind's own metrics, one of which must be zero.

    Args:
        specs: the metrics.
        exact: name of the metric that must be zero.
        why: its reason.
        precision: profile of the artifact.
        override: the case's own bounds, with ``why``.
        floor: the errors of legitimate runs; None: bounds come from the table.
    """
    table = {name: table_bounds(specs, name) for name in PRECISIONS}
    bounds = gate_bounds(precision, floor, table=table, least=least_bounds(specs), most=most_bounds(specs))
    return {**bounds, exact: Bound(0.0, "exact", why)} | overridden(override)


def relation_precision(profile: str) -> str:
    """Return the profile for comparing two runs of one session, which read the same compressed weights.

    Integer compute types stay in the profile: how one row is quantized may depend on the other rows of its batch.
    """
    compute, _, formats = profile.partition("+")
    return compute if all(name.startswith("mx") for name in formats.split("+") if name) else profile


def overridden(override: Mapping[str, Any], bounds: Mapping[str, Bound] = {}) -> dict[str, Bound]:
    """Return the bounds that the case sets, with the noise of those that they take the place of."""
    values = {name: float(value) for name, value in override.items() if name not in NOT_METRICS}
    return {
        name: Bound(value, "case", str(override["why"]), bounds[name].floor if name in bounds else None)
        for name, value in values.items()
    }


def nan_max(values: Iterable[float]) -> float:
    """Return the maximum; NaN if any value is NaN, which Python's ``max`` may lose."""
    return float(np.max(np.fromiter(values, np.float64)))


def missing_bounds_reason(missing: Sequence[str], floor: Floor | None, precision: str = "") -> str:
    """Return why metrics have no bound, and what to do about it."""
    remedy = "give one with its reason in the case's tolerance"
    text = f"no sound bound for {', '.join(missing)}: {remedy}"
    if floor is None and "+" in precision:
        return f"no noise was measured for {precision.partition('+')[2]}, so there is {text}"
    if floor is None:
        return text
    if not np.isfinite([value for values in floor.errors.values() for value in values]).all():
        return f"the original model itself gives NaN or infinity in {floor.profile}; {text}"
    if floor.profile == "fp32":
        return (
            "runs of the original model in fp32 are off by more than rounding explains, as those of a model that draws"
            f" random numbers are; {text}"
        )
    return f"legitimate runs in {floor.profile} are so far off that anything would pass; {text}"
