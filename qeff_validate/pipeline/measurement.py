# SPDX-License-Identifier: Apache-2.0
"""Timings of one case on one runtime, as distributions, and their form in reports and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from qeff_validate.comparison.timing import Interval, Seconds, quantile_interval
from qeff_validate.errors import IncomparableError

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Timings:
    """The shots of one workload.

    Attributes:
        name: of the workload.
        quantity: what its duration is.
        rows: rows that one duration processes.
        tokens: tokens that one duration produces.
        seconds: float64 ``[launches, rounds, shots]``.
        kernel: of a fixed numpy kernel beside each round, float64 ``[launches, rounds]``, seconds.
        warm_up: shots that were left out at the start of each launch.
        settled: whether every launch got no faster any more before it was timed.
    """

    name: str
    quantity: str
    rows: int
    tokens: int
    seconds: Seconds
    kernel: Seconds
    warm_up: tuple[int, ...] = ()
    settled: bool = True

    def quantile(self, quantile: float) -> Interval:
        """Return a quantile in seconds, with bounds at 99 % each."""
        return quantile_interval(self.seconds, quantile)

    @property
    def rates(self) -> dict[str, float]:
        """Rows per second, and tokens per second where tokens are produced, at the median."""
        middle = float(np.median(self.seconds))
        rates = {"rows_per_s": self.rows / middle} if self.rows else {}
        return {**rates, "tokens_per_s": self.tokens / middle} if self.tokens else rates

    def summary(self) -> dict[str, float]:
        """Return quantiles in milliseconds, rates, and the number of shots."""
        flat = self.seconds.ravel()
        milliseconds = {f"{name}_ms": float(np.quantile(flat, q)) * 1e3 for name, q in QUANTILES.items()}
        return {**milliseconds, **self.rates, "shots": flat.size}


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was measured of one case on one runtime.

    Attributes:
        workloads: timings by the name of the workload.
        costs: ``load_s``, ``export_s``, ``compile_s``, ``artifact_mb``, ``host_mb``, ``device_mb``, as far as known.
        machine: what each launch saw of the machine (`machine.MachineWatch.stop`).
        fingerprint: of the machine.
    """

    workloads: Mapping[str, Timings]
    costs: Mapping[str, float]
    machine: tuple[Mapping[str, Any], ...]
    fingerprint: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        """Return plain data: the whole distributions, in microseconds, never one number alone."""
        return {
            "workloads": [
                {
                    **{name: getattr(item, name) for name in ("name", "quantity", "rows", "tokens", "settled")},
                    "warm_up": list(item.warm_up),
                    "summary": {key: float(f"{value:.5g}") for key, value in item.summary().items()},
                    "microseconds": _microseconds(item.seconds),
                    "kernel_microseconds": _microseconds(item.kernel),
                }
                for item in self.workloads.values()
            ],
            "costs": {name: float(f"{value:.5g}") for name, value in self.costs.items()},
            "machine": [dict(state) for state in self.machine],
            "fingerprint": dict(self.fingerprint),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Measurement:
        """Return what `plain` returned.

        Raises:
            IncomparableError: a key is missing or of another type, or rounds do not fit.
        """
        try:
            stored = _Stored.model_validate(plain)
            workloads = {item.name: item.timings() for item in stored.workloads}
        except (ValidationError, ValueError) as exc:
            raise IncomparableError(f"stored timings cannot be read: {str(exc).splitlines()[0]}") from exc
        return cls(workloads, stored.costs, tuple(stored.machine), stored.fingerprint)

    @classmethod
    def of_launches(cls, launches: Sequence[Mapping[str, Any]], side: int, costs: Mapping[str, float]) -> Measurement:
        """Return the measurement of one side from the results of launches (`timing_worker.launch`).

        Args:
            launches: at least one; all with the same plan.
            side: place of the program among the sides of each launch, from 0.
            costs: of building it.
        """
        workloads = {}
        for at, first in enumerate(launches[0]["workloads"]):
            of_launches = [launch["workloads"][at] for launch in launches]
            rounds = min(len(item["kernel"]) for item in of_launches)  # a slow launch may have ended early
            workloads[first["name"]] = Timings(
                name=first["name"],
                quantity=first["quantity"],
                rows=first["rows"],
                tokens=first["tokens"],
                seconds=np.array([item["seconds"][side][:rounds] for item in of_launches], dtype=np.float64),
                kernel=np.array([item["kernel"][:rounds] for item in of_launches], dtype=np.float64),
                warm_up=tuple(item["warm_up"][side] for item in of_launches),
                settled=all(item["settled"] for item in of_launches),
            )
        known = {}
        for name in ("load_s", "host_mb", "device_mb"):
            # what is opened second finds libraries loaded and freed memory at hand
            opened = [launch["sides"][side][name] for launch in launches if launch["opened_first"] == side]
            if opened and None not in opened:
                known[name] = float(np.median(opened))
        machine = tuple(launch["machine"] for launch in launches)
        return cls(workloads, {**known, **costs}, machine, launches[0]["fingerprint"])


class _StoredTimings(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    quantity: str
    rows: NonNegativeInt
    tokens: NonNegativeInt
    settled: bool
    warm_up: list[NonNegativeInt]
    microseconds: list[list[list[NonNegativeFloat]]]
    kernel_microseconds: list[list[NonNegativeFloat]]

    def timings(self) -> Timings:
        """Return the timings in seconds."""
        seconds, kernel = np.array(self.microseconds) / 1e6, np.array(self.kernel_microseconds) / 1e6
        if kernel.shape != seconds.shape[:2] or 0 in seconds.shape or not seconds.all():
            raise ValueError(f"{self.name}: wanted positive [launches, rounds, shots], got {seconds.shape}")
        if not kernel.all():
            raise ValueError(f"{self.name}: the kernel took no time")
        return Timings(
            self.name, self.quantity, self.rows, self.tokens, seconds, kernel, tuple(self.warm_up), self.settled
        )


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True)

    workloads: list[_StoredTimings]
    costs: dict[str, NonNegativeFloat]
    machine: list[dict[str, Any]]
    fingerprint: dict[str, Any]


def _microseconds(seconds: Seconds) -> Any:
    return np.round(seconds * 1e6, 2).tolist()
