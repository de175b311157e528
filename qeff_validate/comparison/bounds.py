# SPDX-License-Identifier: Apache-2.0
"""Bounds of metrics: measured, a case's own, or of the table, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from qeff_validate.comparison.noise_floor import Floor, factor, limit
from qeff_validate.errors import ConfigError, IncomparableError, suggest

FALLBACK: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "fp32": {"rel_l2": 5e-5, "cosine": 1e-9, "norm_ratio": 1e-5, "max_abs_rms": 5e-5},
        "fp16": {"rel_l2": 1e-2, "cosine": 5e-5, "norm_ratio": 2e-3, "max_abs_rms": 3e-2},
        "bf16": {"rel_l2": 5e-2, "cosine": 1e-3, "norm_ratio": 1e-2, "max_abs_rms": 1.5e-1},
    }
)
"""Bounds by precision: in fp32 at least 5 times the worst row of healthy artifacts under kernels of several processors,
in fp16 twice (``make calibrate``; numbers in docs/power.md). Compressed weights and state have none: their noise is
measured by emulation."""


LEAST: Mapping[str, float] = MappingProxyType(
    {"rel_l2": 1e-6, "cosine": 1e-12, "norm_ratio": 1e-6, "max_abs_rms": 1e-5}
)
"""No measured bound is below these: eight units in the last place of float32, and what follows from it."""


SYSTEMATIC_ERRORS: Mapping[str, float] = MappingProxyType({"mean_signed": 1e-5, "mean_norm": 1e-6})
"""Systematic parts of a device's error, with the least bound of each."""


SYSTEMATIC_FACTOR = 1.5
"""Multiplies the limit of a systematic error, in addition to the factor of the precision.

The worst of 51 held-out graphs on the simulated device had 1.76 times the limit.
"""


FAR = 20.0
"""A measured bound in float32 may exceed the table's by so much: what is further off is no rounding.

A model that draws random numbers would otherwise widen the bound that it is judged by.
"""


NOISE_SHARE = 5.0
"""A bound of the table over the noise that is usual (2e-3 in fp16, of 1e-2); used where no floor is."""


MOST = {"rel_l2": 1.0, "cosine": 1.0, "norm_ratio": 1.0, "max_abs_rms": 10.0, "neighbour_order": 1.0}
"""A bound that reaches this accepts unrelated or absent vectors (zeros have rel_l2 1), so it is refused."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The greatest accepted value of a metric, where it comes from, and why."""

    value: float
    source: Literal["floor", "case", "fallback", "exact"]
    why: str
    floor: float | None = None
    """What is usual among legitimate runs, where it was measured."""


def check_tolerance(where: str, values: Mapping[str, Any], most: Mapping[str, float] = MOST) -> None:
    """Refuse a tolerance that names no metric, gives no reason, or has a bound that gates nothing.

    Args:
        where: what to call it in an error.
        values: metric to bound, and ``why``.
        most: the metrics that there are, with what a bound must stay below.

    Raises:
        ConfigError: an unknown metric, a bound that is NaN, infinite, negative or absurdly wide, or no ``why``.
    """
    bounds = {name: value for name, value in values.items() if name != "why"}
    for name, value in bounds.items():
        if name not in most:
            raise ConfigError(f"{where}: no metric is called {name!r}.{suggest(name, most)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < most[name]):
            raise ConfigError(
                f"{where}.{name}: {value!r} is no usable bound: give a number from 0 to below {most[name]:g}"
            )
    if bounds and not str(values.get("why") or "").strip():
        raise ConfigError(f"{where}: a bound needs its reason: add why: '…'")


def measured_bound(name: str, floor: Floor, least: float, most: float) -> Bound | None:
    """Return the bound of a metric from the errors of legitimate runs; None if it would reach ``most``.

    Raises:
        IncomparableError: the floor has no errors in this metric.
    """
    if name not in floor.errors:
        raise IncomparableError(f"the noise floor has no errors of the metric {name!r}: measure or record it anew")
    farthest, times = limit(name, floor.errors[name]), factor(floor.profile, name)
    value = nan_max((times * farthest, least))
    if not value < most:
        return None
    why = f"{times:g} x {farthest:.2g}, the 95/95 limit of {len(floor.errors[name])} legitimate runs in {floor.profile}"
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
    """Return bounds from the errors of legitimate runs, or those of a precision's table where none were measured.

    Args:
        precision: profile of what computes.
        floor: the errors of legitimate runs.
        table: bounds by precision.
        least: what no measured bound is below, for each metric that gets one.
        most: what a bound must stay below.
    """
    if floor is None:
        return {
            name: Bound(value, "fallback", f"{precision} profile") for name, value in table.get(precision, {}).items()
        }
    near = {name: FAR * value for name, value in table["fp32"].items()} if floor.profile == "fp32" else {}
    made = {
        name: measured_bound(name, floor, value, min(most[name], near.get(name, math.inf)))
        for name, value in least.items()
    }
    return {name: bound for name, bound in made.items() if bound is not None}


def systematic_bounds(floor: Floor) -> dict[str, Bound]:
    """Return the bounds of a device's systematic errors; none where the noise is not finite."""
    bounds = {}
    for name, least in SYSTEMATIC_ERRORS.items():
        if name not in floor.systematic_errors:
            raise IncomparableError(f"the noise floor has no {name!r} of a device: measure or record it anew")
        farthest, times = limit(name, floor.systematic_errors[name]), SYSTEMATIC_FACTOR * factor(floor.profile, name)
        if not np.isfinite(farthest):
            continue
        why = f"{times:g} x {farthest:.2g}, the 95/95 limit of legitimate runs in {floor.profile} against their mean"
        typical = float(np.median(floor.systematic_errors[name]))
        bounds[name] = Bound(nan_max((times * farthest, least)), "floor", why, typical)
    return bounds


def bounds_for(precision: str, *, override: Mapping[str, Any], floor: Floor | None = None) -> dict[str, Bound]:
    """Return the bound of every gate for a precision profile; a metric without a sound bound has none.

    Args:
        precision: ``fp32``, ``fp16``, ``bf16`` or a profile without fallback such as ``fp16+mxfp6``.
        override: the case's own bounds, with ``why``.
        floor: the errors of legitimate runs; None: bounds are those of the precision's profile.
    """
    bounds = gate_bounds(precision, floor, table=FALLBACK, least=LEAST, most=MOST)
    if bounds:
        bounds["neighbour_order"] = Bound(0.0, "exact", "no neighbour moves further than noise allows")
    return bounds | overridden(override)


def relation_precision(profile: str) -> str:
    """Return the profile that two runs of one session are compared by: both read the same compressed weights.

    Integers that are computed with stay in it: what one row rounds to may depend on its neighbours.
    """
    compute, _, kept = profile.partition("+")
    return compute if all(part.startswith("mx") for part in kept.split("+") if part) else profile


def overridden(override: Mapping[str, Any]) -> dict[str, Bound]:
    """Return the bounds that a case brings itself."""
    values = {name: float(value) for name, value in override.items() if name != "why"}
    return {name: Bound(value, "case", str(override["why"])) for name, value in values.items()}


def nan_max(values: Iterable[float]) -> float:
    """Return the greatest of some numbers; NaN if one of them is NaN, which Python's ``max`` loses."""
    return float(np.max(np.fromiter(values, np.float64)))


def missing_bounds_reason(missing: Sequence[str], floor: Floor | None, precision: str = "") -> str:
    """Say why there is no verdict without bounds, and what to do."""
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
