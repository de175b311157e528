# SPDX-License-Identifier: Apache-2.0
"""The machine that times are measured on: what it is, what else it does meanwhile, and how fast it is just now."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.models.framework_calls import versions
from qeff_validate.runtimes.ort import OPTIMIZATION

BUSY_SHARE = 0.1
"""Share of all processors' time that other processes may use before a failed gate becomes inconclusive."""

STEAL_SHARE = 0.02
"""Share of time that a hypervisor may take."""

NAMED_PROCESSES = 3
"""Busy processes that a message names."""

KERNEL_VALUES = 1 << 15
"""Of the kernel that tells the speed of a processor: 128 KB, which stay in its second-level cache."""

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "QAIC_SIM_THREADS")
"""Environment variables that change how many threads compute, and how they wait."""

KERNELS = (
    *("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_NUM_THREADS", "NPY_DISABLE_CPU_FEATURES"),
    *("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", OPTIMIZATION),
)
"""Environment variables that change how numbers are rounded; reports record those that are set."""

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def machine_fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what times depend on besides the program: processors, memory, libraries, threads.

    Args:
        settings: of the runtime, as plain data.
    """
    models = [line.partition(":")[2].strip() for line in _lines("cpuinfo") if line.startswith("model name")]
    memory = next((line.split()[1] for line in _lines("meminfo") if line.startswith("MemTotal")), "0")
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(int(memory) / 1e6),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions("numpy", "onnxruntime", "torch"),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "settings": dict(settings),
    }


class MachineWatch:
    """Observes the machine from its creation to `stop`, as far as Linux tells."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._own, self._all, self._throttled = time.process_time(), _processor_seconds(), _throttle_count()
        self._processes = dict(_processes())

    def stop(self) -> dict[str, Any]:
        """Return what happened meanwhile, as plain data.

        Returns:
            ``seconds``; ``others``: share of all processors' time that other processes used; ``steal``: share that a
            hypervisor took; ``busiest``: other processes with their share of one processor; ``load``: the system's
            average of the last minute; ``mhz``: lowest and highest clock; ``throttled``: times that a processor was
            slowed down for its temperature.
        """
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        own, (busy, steal) = time.process_time() - self._own, _processor_seconds()
        capacity = elapsed * (os.cpu_count() or 1)
        others = max(busy - self._all[0] - own, 0.0) / capacity
        used = [
            (name, seconds - self._processes[pid][1] if pid in self._processes else 0.0)
            for pid, (name, seconds) in _processes()
            if pid != os.getpid()
        ]
        busiest = sorted(used, key=lambda item: -item[1])[:NAMED_PROCESSES]
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return {
            "seconds": round(elapsed, 3),
            "others": round(min(others, 1.0), 4),  # ticks are coarse
            "steal": round((steal - self._all[1]) / capacity, 4),
            "busiest": [f"{name} ({value / elapsed:.0%})" for name, value in busiest if value > 0.02 * elapsed],
            "load": round(load, 2),
            "mhz": _clocks(),
            "throttled": _throttle_count() - self._throttled,
        }


def disturbances(states: list[Mapping[str, Any]]) -> str:
    """Return what made timings doubtful, from the states of `MachineWatch`; empty if nothing did."""
    seconds = sum(state["seconds"] for state in states) or 1.0
    others = sum(state["others"] * state["seconds"] for state in states) / seconds
    steal = sum(state["steal"] * state["seconds"] for state in states) / seconds
    parts = []
    if others > BUSY_SHARE:
        names = list(dict.fromkeys(name for state in states for name in state["busiest"]))[:NAMED_PROCESSES]
        parts.append(f"other processes used {others:.0%} of the processors: {', '.join(names) or 'short-lived ones'}")
    if steal > STEAL_SHARE:
        parts.append(f"the hypervisor took {steal:.0%} of the time")
    throttled = sum(state["throttled"] for state in states)
    if throttled:
        parts.append(f"processors were throttled {throttled} times")
    return "; ".join(parts)


def kernel_seconds() -> float:
    """Return how long a small fixed numpy kernel takes, in seconds: the fastest of three.

    It runs on one thread and in the cache, so it follows the clock of a processor and who shares it.
    """
    values = np.linspace(0.1, 1.0, KERNEL_VALUES, dtype=np.float32)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        total = values
        for _ in range(8):
            total = np.sqrt(total * values + values)
        times.append(time.perf_counter() - start)
    return min(times)


def resident_peak_mb() -> float | None:
    """Return the peak of this process's resident memory since `reset_resident_peak`, in 10^6 bytes; None: unknown."""
    return _status("VmHWM")


def resident_mb() -> float | None:
    """Return this process's resident memory, in 10^6 bytes; None: unknown."""
    return _status("VmRSS")


def reset_resident_peak() -> None:
    """Let the peak begin anew, where the system can (proc(5), clear_refs)."""
    with suppress(OSError):
        (_PROC / "self" / "clear_refs").write_text("5")


def available_mb() -> float:
    """Return the memory that can be taken without swapping, in 10^6 bytes (proc(5), MemAvailable); unknown: inf."""
    value = next((line.split()[1] for line in _lines("meminfo") if line.startswith("MemAvailable:")), None)
    return float("inf") if value is None else int(value) * 1024 / 1e6


def _status(name: str) -> float | None:
    value = next((line.split()[1] for line in _lines("self/status") if line.startswith(f"{name}:")), None)
    return None if value is None else int(value) * 1024 / 1e6


def _processor_seconds() -> tuple[float, float]:
    """Return the seconds that all processors were busy with processes here, and those that a hypervisor took."""
    fields = next((line.split()[1:] for line in _lines("stat") if line.startswith("cpu ")), [])
    ticks = [int(field) for field in fields] + [0] * 8
    user, nice, system, _, _, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq) / _TICK, steal / _TICK


def _processes() -> Iterator[tuple[int, tuple[str, float]]]:
    """Yield the id of each process with its name and the seconds that it has computed."""
    for path in _PROC.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it may have ended meanwhile
            head, _, tail = path.read_text(errors="replace").rpartition(")")
            fields = tail.split()
            seconds = (int(fields[11]) + int(fields[12])) / _TICK
            yield int(path.parent.name), (head.partition("(")[2], seconds)


def _clocks() -> list[float]:
    """Return the lowest and the highest clock of the processors, in MHz; empty if the system does not tell."""
    values = []
    for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        with suppress(OSError, ValueError):
            values.append(int(path.read_text()) / 1000)
    if not values:
        values = [float(line.partition(":")[2]) for line in _lines("cpuinfo") if line.startswith("cpu MHz")]
    return [round(min(values)), round(max(values))] if values else []


def _throttle_count() -> int:
    count = 0
    for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with suppress(OSError, ValueError):
            count += int(path.read_text())
    return count


def _lines(name: str) -> list[str]:
    try:
        return (_PROC / name).read_text(errors="replace").splitlines()
    except OSError:
        return []
