# SPDX-License-Identifier: Apache-2.0
"""Timings in a report as text: workloads, costs, judgements, and what may be said in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from qeff_validate.report.result import Result

TIMING = "timing"
"""What results of timings have as ``reference``: nothing was compared with the original model."""

IN_TIME, NOT_IN_TIME = "In time", "Not shown to be in time"
"""What the closing says of timings that keep their budgets and limits, and of the others."""

HEAD = ("case", "runtime", "workload", "p50 ms", "p95 ms", "p99 ms", "rows/s", "tokens/s", "shots")


class TimedEntry(Protocol):
    """A result, or an entry of a baseline."""

    @property
    def case(self) -> str:
        """The case's name."""

    @property
    def runtime(self) -> str:
        """The runtime's name."""

    @property
    def simulated(self) -> bool:
        """True if the runtime stands in for hardware."""

    @property
    def performance(self) -> Mapping[str, Any] | None:
        """Timings of `pipeline.performance`; None without any."""


def is_timing(result: Result) -> bool:
    """Return True for the result of a timing, which says nothing about agreement."""
    return result.reference == TIMING


def timing_rows(results: Sequence[TimedEntry]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each workload under `HEAD`."""
    for result in results:
        name = result.runtime + (" (simulated)" if result.simulated else "")
        for item in (result.performance or {"workloads": []})["workloads"]:
            keys = ("p50_ms", "p95_ms", "p99_ms", "rows_per_s", "tokens_per_s", "shots")
            numbers = [f"{item['summary'][key]:.4g}" if key in item["summary"] else "" for key in keys]
            yield result.case, name, f"{item['quantity']}, {item['name']}", *numbers


def timing_lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield the costs of each case, and what was said of each budget and slowdown."""
    for result in results:
        if result.performance is None:
            continue
        head = f"{result.case}-{result.runtime}{' (simulated)' if result.simulated else ''}"
        yield f"{head}: {', '.join(f'{name} {value:.4g}' for name, value in result.performance['costs'].items())}"
        for item in result.performance["judgements"]:
            yield f"{head}: {item['name']}: {item['status']}: {item['reason']}"


def timing_closing(results: Sequence[Result]) -> Iterator[str]:
    """Yield sentences that say what held in time."""
    timed = [result for result in results if is_timing(result)]
    for runtime in dict.fromkeys(result.runtime for result in timed):
        passed = [result for result in timed if result.runtime == runtime and result.status == "pass"]
        if not passed:
            continue
        where = f"{runtime}, a simulated AI 100 (no claim about a card)," if passed[0].simulated else runtime
        count = sum(result.compared for result in passed)
        yield f"{IN_TIME}: {where} keeps {count} budgets and limits: {', '.join(result.case for result in passed)}."
    bad = [f"{result.case}-{result.runtime} ({result.status})" for result in timed]
    bad = [text for text, result in zip(bad, timed, strict=True) if result.status not in ("pass", "not_run")]
    if bad:
        yield f"{NOT_IN_TIME}: {', '.join(bad)}."
