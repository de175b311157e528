# SPDX-License-Identifier: Apache-2.0
"""Figures of `bench`: what was measured beside what is wanted, how they are measured, and the page made of them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

MIB = 1 << 20

HEAD = """# Performance

Written by `make bench` from one run; nothing here is edited by hand. Times are from the machine of the last section. A
figure that compares two things has measured both in turn. The figures gate nothing: a loaded machine must not turn a
build red. How sure `qeff-validate perf` is of a slowdown is on another page, [the timing gate](timing-gate.md).
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what it is, mostly of two things as "A over B".
        value: a ratio, or a number in ``unit``.
        goal: ``<= LIMIT`` or ``>= LIMIT``; empty: none is set.
        detail: the times behind a ratio.
        unit: of ``value``; empty: a ratio.
    """

    name: str
    value: float
    goal: str = ""
    detail: str = ""
    unit: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal. A value that is not a number reaches none."""
        if not self.goal:
            return None
        sign, limit = self.goal.split()
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)

    def __str__(self) -> str:
        goal = "" if self.reached is None else f" (goal {self.goal}{'' if self.reached else ', MISSED'})"
        return f"{self.name}: {self.value:.3g}{f' {self.unit}' if self.unit else ''}{goal}  {self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class Share:
    """The seconds of one stage among those of a run, whose name and whole duration are given."""

    run: str
    stage: str
    seconds: float
    total: float

    def __str__(self) -> str:
        return f"{self.run}: {self.stage} {self.seconds:.1f} of {self.total:.1f} s"


@dataclass(frozen=True, slots=True)
class Missing:
    """A bench that was not measured, and why."""

    bench: str
    reason: str

    def __str__(self) -> str:
        return f"{self.bench}: not measured: {self.reason}"


Measured = Figure | Share | Missing


def paired(first: Callable[[], object], second: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Return the median of first/second over pairs, and the median seconds of each; one warm-up of both."""
    first(), second()
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        pair = []
        for call in (first, second):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    return median(a / b for a, b in times), median(a for a, _ in times), median(b for _, b in times)


def peak_above_start(call: Callable[[], object]) -> float:
    """Return the greatest resident memory during a call above what it was before, in MiB, sampled every 2 ms."""
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            done.wait(0.002)

    start = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(0, peak[0] - start) / MIB


def ms(first: float, second: float) -> str:
    """Return two times in milliseconds."""
    return f"{first * 1e3:.0f} / {second * 1e3:.0f} ms"


def run(arguments: Sequence[str], store: Path) -> tuple[float, float]:
    """Run ``qeff-validate run`` in a process of its own; return its seconds and the peak of its private memory.

    Args:
        arguments: of the command.
        store: directory of the store; the report goes to ``report`` in it.

    Returns:
        Seconds, and bytes of the process tree that no file holds (`own_memory`), the greatest of samples.

    Raises:
        RuntimeError: the command ends with a usage error, or an error of a case.
    """
    command = [sys.executable, "-m", "qeff_validate.cli", "run", *arguments, "--store", str(store), "--quiet"]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [*command, "--report", str(store / "report")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                tree = [process, *process.children(recursive=True)]
                peak = max(peak, sum(own_memory(each.pid) for each in tree))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass
            time.sleep(0.1)
        assert child.stdout is not None
        if child.returncode > 1:
            raise RuntimeError(child.stdout.read().decode())
    return time.perf_counter() - start, peak


def own_memory(process: int) -> int:
    """Return the bytes of a process's anonymous memory: its own, without pages of files that are mapped; 0: it ended.

    Pages of a mapped file are in the page cache, from which the system takes them if it needs room.
    """
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def plain(data: Sequence[Measured], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``bench.json`` holds."""
    figures = [{**asdict(each), "reached": each.reached} for each in data if isinstance(each, Figure)]
    return {
        "schema": 1,
        "machine": dict(machine),
        "figures": figures,
        "stages": [asdict(each) for each in data if isinstance(each, Share)],
        "not_measured": [asdict(each) for each in data if isinstance(each, Missing)],
    }


def page(report: Mapping[str, Any]) -> str:
    """Return ``docs/performance.md`` from what ``bench.json`` holds."""
    lines = [HEAD, "## Figures\n", "| figure | measured | goal | reached | |", "|---|---|---|---|---|"]
    for each in report["figures"]:
        reached = {None: "", True: "yes", False: "**no**"}[each["reached"]]
        lines.append(
            f"| {each['name']} | {each['value']:.3g} {each['unit']} | {each['goal']} | {reached} | {each['detail']} |"
        )
    if report["not_measured"]:
        lines.append("\n## Not measured\n")
        lines += [f"- {each['bench']}: {each['reason']}" for each in report["not_measured"]]
    runs = list(dict.fromkeys(each["run"] for each in report["stages"]))
    for name in runs:
        shares = [each for each in report["stages"] if each["run"] == name]
        lines += [f"\n## Where the time of {name} goes\n", f"{shares[0]['total']:.1f} s in all, from an empty store.\n"]
        lines += ["| stage | seconds | share |", "|---|---|---|"]
        lines += [
            f"| {each['stage']} | {each['seconds']:.1f} | {each['seconds'] / each['total']:.0%} |" for each in shares
        ]
    lines += ["\n## The machine\n", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in report["machine"].items()]
    return "\n".join(lines) + "\n"
