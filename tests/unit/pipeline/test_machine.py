# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from qeff_validate.pipeline import machine
from qeff_validate.pipeline.machine import MachineWatch, disturbances, kernel_seconds, machine_fingerprint

QUIET = {"seconds": 2.0, "others": 0.05, "steal": 0.0, "busiest": [], "throttled": 0}


def test_quiet_machine_has_no_disturbance() -> None:
    assert disturbances([QUIET, QUIET]) == ""


def test_disturbances_are_weighted_by_time_and_named() -> None:
    busy = {**QUIET, "others": 0.5, "busiest": ["make (90%)", "cc1 (40%)"], "seconds": 0.1}
    assert disturbances([QUIET, busy]) == ""
    said = disturbances([QUIET, {**busy, "seconds": 2.0}])
    assert said == "other processes used 28% of the processors: make (90%), cc1 (40%)"
    assert "throttled 3 times" in disturbances([{**QUIET, "throttled": 3}])
    assert "hypervisor took 10%" in disturbances([{**QUIET, "steal": 0.1}])


def test_own_work_is_nobody_elses(monkeypatch) -> None:
    """Two processors, one second: this process computes 0.9 s of the 1.5 s that they were busy."""
    clock, own, busy = iter([10.0, 11.0]), iter([3.0, 3.9]), iter([(100.0, 5.0), (101.5, 5.1)])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    monkeypatch.setattr(machine, "_processor_seconds", lambda: next(busy))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    lists = iter([[(7, ("cc1", 2.0))], [(7, ("cc1", 2.5)), (8, ("new", 40.0))]])
    monkeypatch.setattr(machine, "_processes", lambda: next(lists))
    state = MachineWatch().stop()
    assert (state["others"], state["steal"], state["busiest"]) == (0.3, 0.05, ["cc1 (50%)"])


def test_watch_and_fingerprint_are_plain_and_complete_here() -> None:
    state = MachineWatch().stop()
    assert 0 <= state["others"] <= 1
    made = machine_fingerprint({"threads": 1})
    assert made["processors"] >= 1
    assert made["settings"] == {"threads": 1}
    assert kernel_seconds() > 0
