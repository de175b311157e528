# SPDX-License-Identifier: Apache-2.0
"""What is said of timings: launches are made up with a seed, so no test depends on how fast anything is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qeff_validate as qv
from qeff_validate.artifact import Artifact
from qeff_validate.config.performance import Performance
from qeff_validate.errors import ConfigError, IncomparableError, RunError
from qeff_validate.pipeline import performance, timing_worker
from qeff_validate.pipeline.measurement import Measurement
from qeff_validate.pipeline.performance import TimingBaseline, check_performance, measure_case
from qeff_validate.pipeline.stages import Silent, Stages
from qeff_validate.protocols import Capabilities
from qeff_validate.report.result import Result
from qeff_validate.report.text import closing

QUIET = {"seconds": 1.0, "others": 0.01, "steal": 0.0, "busiest": [], "load": 0.1, "mhz": [2000, 2000], "throttled": 0}
BUSY = {**QUIET, "others": 0.5, "busiest": ["make (99%)"]}
MACHINE = {"processor": "one", "processors": 2}


class Machine:
    """Stands for the processes of launches: programs of a given duration, in seconds, with a little noise.

    Args:
        durations: of each case by name.
        state: what the launches see of the machine.
        fingerprint: of the machine.
        buckets: workloads by name, with how many times the duration they take.
    """

    def __init__(
        self,
        durations: dict[str, float],
        state: Any = QUIET,
        fingerprint: Any = MACHINE,
        buckets: Any = MappingProxyType({"batch 4": 1.0}),
    ) -> None:
        self.durations, self.state, self.fingerprint, self.buckets = durations, state, fingerprint, buckets
        self.random, self.jobs = np.random.default_rng(0), list[Any]()

    def launch(self, job: Any, limit: float, name: str) -> dict[str, Any]:
        self.jobs.append(job)
        names = [case["name"] + case["source"].partition(":")[2] for case in job["cases"]]
        workloads = []
        for bucket, factor in self.buckets.items():
            seconds = [factor * self.durations[n] * np.exp(self.random.normal(0, 0.002, (10, 8))) for n in names]
            workload = {"name": bucket, "quantity": "latency", "rows": 4, "tokens": 0, "plan": [10, 4], "settled": True}
            workload |= {"warm_up": [2] * len(names), "seconds": [item.tolist() for item in seconds]}
            workloads.append({**workload, "kernel": [0.001] * 10})
        first = job["order"][0]
        facts = {"load_s": 0.5, "device_mb": None}
        return {
            "sides": [{**facts, "host_mb": 20.0 if at == first else 1.0} for at in range(len(names))],
            "opened_first": first,
            "workloads": workloads,
            "unpaired": [],
            "machine": self.state,
            "fingerprint": self.fingerprint,
        }


def case(source: str = "new", **changes: Any) -> qv.Case:
    return qv.Case(name="a", source=f"random:{source}", runtimes=["ort"], performance=Performance(**changes))


def timed(
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
    baseline: TimingBaseline | None = None,
    *,
    capabilities: Capabilities = Capabilities(),  # noqa: B008 (frozen)
    name: str = "ort",
    **changes: Any,
) -> Result:
    monkeypatch.setattr(performance, "run_launch", machine.launch)
    made = case(**changes)
    pipeline: Any = SimpleNamespace(
        case=made,
        stages=Stages("a", Silent()),
        store=SimpleNamespace(root=Path("store")),
        seconds={"export": 1.5},
        inputs=lambda: None,
        artifact=lambda kind, sdk: Artifact("module", None, ""),
    )
    runtime: Any = SimpleNamespace(name=name, kind="onnx", capabilities=capabilities, probe=lambda: None)
    return measure_case(pipeline, runtime, qv.Settings(), baseline=baseline)


def live() -> TimingBaseline:
    return TimingBaseline("old.yaml", case=case("old"))


# --- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "status"),
    [
        ({"p95_ms": 12.0}, "pass"),
        ({"p95_ms": 9.0}, "fail"),
        ({"p50_ms": 10.0001, "p99_ms": 9.0}, "fail"),
        ({"rows_per_s": 390.0}, "pass"),
        ({"rows_per_s": 450.0}, "fail"),
        ({"load_s": 0.4}, "fail"),
        ({"load_s": 0.6, "export_s": 2.0, "host_mb": 21.0}, "pass"),
        ({"export_s": 1.0}, "fail"),
        ({"device_mb": 100.0}, "inconclusive"),
    ],
)
def test_budget_decides(monkeypatch: pytest.MonkeyPatch, budget: dict[str, float], status: str) -> None:
    result = timed(monkeypatch, Machine({"anew": 0.01}), **budget)
    assert (result.status, result.planned) == (status, len(budget)), result.reason


def test_slowest_bucket_decides_on_a_duration_and_the_best_one_on_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"anew": 0.01}, buckets={"batch 4": 1.0, "batch 8": 2.0})
    assert "latency p50 in ms (batch 8): over budget" in timed(monkeypatch, machine, p50_ms=15.0).reason
    assert timed(monkeypatch, machine, rows_per_s=390.0).status == "pass"


def test_memory_is_that_of_launches_in_which_the_program_was_opened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Machine({"anew": 0.01, "aold": 0.01}), live())
    assert result.performance is not None
    assert result.performance["costs"]["host_mb"] == 20


def test_loaded_machine_is_never_red(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Machine({"anew": 0.01}, BUSY), p95_ms=5.0)
    assert result.status == "inconclusive"
    assert "make (99%)" in result.reason
    assert timed(monkeypatch, Machine({"anew": 0.01}, BUSY), p95_ms=50.0).status == "pass"
    assert timed(monkeypatch, Machine({"anew": 0.01}, BUSY), host_mb=5.0).status == "fail", "a size needs no quiet"


def test_what_has_no_budget_is_measured_and_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Machine({"anew": 0.01}))
    assert (result.status, result.compared) == ("not_run", 0)
    assert "measured, not judged" in result.reason
    assert result.performance is not None
    assert result.performance["workloads"][0]["summary"]["p50_ms"] == pytest.approx(10, rel=0.01)


def test_quantile_of_too_few_shots_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Machine({"anew": 0.01}), launches=3, p99_ms=50.0)
    assert "240 shots, and it needs 300" in result.reason
    assert result.status == "inconclusive"


def test_budget_for_a_duration_that_the_kind_has_not_is_refused_before_any_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine({"anew": 0.01})
    result = timed(monkeypatch, machine, inter_token={"p50_ms": 3.0})
    assert (result.status, result.stage, machine.jobs) == ("error", "config", [])
    assert "'embedding' has no inter_token; it has latency" in result.reason


def test_launches_alternate_and_share_their_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"anew": 0.01, "aold": 0.01})
    timed(monkeypatch, machine, live())
    assert [job["order"] for job in machine.jobs] == [[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]] * 2
    assert [job["plan"] for job in machine.jobs] == [{}, *[{"batch 4": [10, 4]}] * 9]


# --- baselines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("duration", "status"), [(0.01, "pass"), (0.0104, "pass"), (0.0115, "fail"), (0.008, "pass")])
def test_live_baseline_decides(monkeypatch: pytest.MonkeyPatch, duration: float, status: str) -> None:
    result = timed(monkeypatch, Machine({"aold": 0.01, "anew": duration}), live(), max_slowdown="5 %")
    assert result.status == status, result.reason
    improved = [text for text in result.findings if "time for a new baseline" in text]
    assert bool(improved) == (duration < 0.009)


def test_slowdown_on_a_loaded_machine_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, Machine({"aold": 0.01, "anew": 0.02}, BUSY), live()).status == "inconclusive"


def test_workload_of_one_side_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"aold": 0.01, "anew": 0.01})
    launch = machine.launch
    machine.launch = lambda *args: {**launch(*args), "unpaired": ["batch 8"]}  # type: ignore[method-assign]
    result = timed(monkeypatch, machine, live())
    assert any("'batch 8'" in text for text in result.findings)


def stored(monkeypatch: pytest.MonkeyPatch, **machine: Any) -> TimingBaseline:
    result = timed(monkeypatch, Machine({"anew": 0.01}, **machine))
    assert result.performance is not None
    return TimingBaseline("qv-report", stored=Measurement.from_plain(result.performance))


@pytest.mark.parametrize(("duration", "status"), [(0.01, "pass"), (0.0115, "fail")])
def test_stored_timings_decide_on_the_same_machine(
    monkeypatch: pytest.MonkeyPatch, duration: float, status: str
) -> None:
    result = timed(monkeypatch, Machine({"anew": duration}), stored(monkeypatch))
    assert result.status == status, result.reason


def test_stored_timings_of_another_machine_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored(monkeypatch, fingerprint={**MACHINE, "processors": 64})
    result = timed(monkeypatch, Machine({"anew": 0.02}), before)
    assert result.status == "inconclusive"
    assert "processors: 64 then, 2 now" in result.reason


def test_stored_timings_of_another_speed_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored(monkeypatch)
    assert before.stored is not None
    for item in before.stored.workloads.values():
        item.kernel[:] *= 1.3
    result = timed(monkeypatch, Machine({"anew": 0.02}), before)
    assert result.status == "inconclusive"
    assert "another speed" in result.reason


def test_stored_form_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Machine({"anew": 0.01}))
    plain = dict(result.plain()["performance"])
    again = Measurement.from_plain(plain)
    assert again.workloads["batch 4"].seconds.shape == (5, 10, 8)
    assert again.plain() == {key: plain[key] for key in ("workloads", "costs", "machine", "fingerprint")}
    for damage in ([], [[[1.0], [2.0, 3.0]]], [[[0.0]]], "x"):
        workload = {**plain["workloads"][0], "microseconds": damage}
        with pytest.raises(IncomparableError, match="cannot be read"):
            Measurement.from_plain({**plain, "workloads": [workload]})


# --- simulated runtimes ----------------------------------------------------------------------------

SIMULATED = Capabilities(simulated=True)


def test_budget_on_a_simulated_runtime_is_refused_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"anew": 0.01, "aold": 0.01})
    for baseline, budget in ((None, {"p95_ms": 50.0}), (live(), {})):
        result = timed(monkeypatch, machine, baseline, capabilities=SIMULATED, name="sim", **budget)
        assert (result.status, result.stage) == ("error", "config")
        assert "simulated: accept" in result.reason
    assert machine.jobs == []


def test_simulated_times_that_are_accepted_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(
        monkeypatch, Machine({"anew": 0.01}), capabilities=SIMULATED, name="sim", p95_ms=50.0, simulated="accept"
    )
    assert (result.status, result.simulated) == ("pass", True)
    assert any("no claim about a card" in text for text in result.findings)
    assert any("no claim about a card" in text for text in closing((result,)))


def test_budgets_of_other_runtimes_leave_a_simulated_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(
        monkeypatch, Machine({"anew": 0.01}), capabilities=SIMULATED, name="sim", p95_ms=1.0, runtimes=["ort"]
    )
    assert result.status == "not_run"
    assert result.performance is not None


def test_simulated_runtime_without_a_budget_may_be_measured() -> None:
    runtime: Any = SimpleNamespace(name="sim", capabilities=SIMULATED)
    check_performance(case(), runtime, against=False)
    with pytest.raises(ConfigError, match="no budget is judged"):
        check_performance(case(), runtime, against=True)


# --- what is told ----------------------------------------------------------------------------------


def test_timings_prove_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = timed(monkeypatch, Machine({"anew": 0.01}), p95_ms=50.0)
    failed = timed(monkeypatch, Machine({"anew": 0.01}), p95_ms=5.0)
    assert closing((passed, failed)) == [
        "In time: ort keeps 1 budgets and limits: a.",
        "Not shown to be in time: a-ort (fail).",
    ]


def test_launch_that_dies_is_an_error_with_what_it_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(performance, "WORKER", "qeff_validate.no_such_module")
    with pytest.raises(RunError, match=r"ended with exit code 1\n.*No module named"):
        performance.run_launch({}, 60, "a")


def test_model_that_is_not_timed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_worker.Pipeline, "inputs", lambda self: None)
    monkeypatch.setattr(timing_worker.Pipeline, "model", lambda self: object())
    settings = {**asdict(qv.Settings()), "device_ids": [0]}
    job = {"settings": settings, "cases": [case().model_dump(mode="json")], "order": [0]}
    with pytest.raises(IncomparableError, match="model kind 'embedding' says not what to time"):
        timing_worker.launch({**job, "runtime": "ort", "store": str(tmp_path)})
