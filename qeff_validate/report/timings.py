# SPDX-License-Identifier: Apache-2.0
"""Timings in a plain report as text: workloads, costs, judgements, and what may be said in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TIMING = "timing"
"""What results of timings have as ``reference``: nothing was compared with the original model."""

HEAD = ("case", "runtime", "workload", "p50 ms", "p95 ms", "p99 ms", "rows/s", "tokens/s", "shots")


def is_timing(result: Mapping[str, Any]) -> bool:
    """Return True for the plain result of a timing, which says nothing about agreement."""
    return bool(result["reference"] == TIMING)


def timing_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each workload under `HEAD`."""
    for result in results:
        name = result["runtime"] + (" (simulated)" if result["simulated"] else "")
        for item in (result.get("performance") or {"workloads": []})["workloads"]:
            keys = ("p50_ms", "p95_ms", "p99_ms", "rows_per_s", "tokens_per_s", "shots")
            numbers = [f"{item['summary'][key]:.4g}" if key in item["summary"] else "" for key in keys]
            yield result["case"], name, f"{item['quantity']}, {item['name']}", *numbers


def timing_lines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what each case cost besides, and what was said of each budget and slowdown."""
    for result in results:
        performance = result.get("performance")
        if performance is None:
            continue
        head = f"{result['case']}-{result['runtime']}{' (simulated)' if result['simulated'] else ''}"
        yield f"{head}: {', '.join(f'{name} {value:.4g}' for name, value in performance['costs'].items())}"
        for item in performance["judgements"]:
            yield f"{head}: {item['name']}: {item['status']}: {item['reason']}"


def timing_closing(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield sentences that say what held in time."""
    timed = [result for result in results if is_timing(result)]
    for runtime in dict.fromkeys(result["runtime"] for result in timed):
        passed = [result for result in timed if result["runtime"] == runtime and result["status"] == "pass"]
        if not passed:
            continue
        simulated = passed[0]["simulated"]
        where = f"{runtime}, a simulated AI 100 (no claim about a card)," if simulated else runtime
        count = sum(result["coverage"]["compared"] for result in passed)
        yield f"In time: {where} keeps {count} budgets and limits: {', '.join(r['case'] for r in passed)}."
    bad = [f"{r['case']}-{r['runtime']} ({r['status']})" for r in timed if r["status"] not in ("pass", "not_run")]
    if bad:
        yield f"Not shown to be in time: {', '.join(bad)}."
