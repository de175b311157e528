# SPDX-License-Identifier: Apache-2.0
"""Measures how fast a case is on a runtime, and judges it against budgets and a baseline.

Each launch is a process of its own (`timing_worker`). With a live baseline both programs are open in each launch and
take turns; a first pass times the baseline against itself. With stored timings the program is timed against itself, and
its times relative to a fixed kernel are compared with those that were stored.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate import errors
from qeff_validate.artifact import Artifact
from qeff_validate.comparison.timing import (
    Interval,
    TimingVerdict,
    judge_budget,
    judge_slowdown,
    least_shots,
    log_ratios,
    median_interval,
    normalised_levels,
    unpaired_interval,
)
from qeff_validate.config.case import Case
from qeff_validate.config.performance import Performance
from qeff_validate.errors import ConfigError, IncomparableError, RunError, ValidateError
from qeff_validate.files import temporary_folder
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.machine import disturbances
from qeff_validate.pipeline.measurement import Measurement, Timings
from qeff_validate.protocols import Runtime, Settings, capabilities, model_kind
from qeff_validate.report.result import Result
from qeff_validate.report.timings import TIMING, TimedEntry
from qeff_validate.sdk.processes import ending, kill

WORKER = "qeff_validate.pipeline.timing_worker"
"""The module that each launch runs."""

LAUNCH_SECONDS = 600
"""How long a launch may take beside its runs: it imports, opens and closes."""

TAIL_LINES = 12
"""Lines of a failed launch's output that an error shows."""

KERNEL_CHANGE = 0.1
"""Change of the kernel's time since a baseline was stored, as a log ratio, beyond which no comparison is tried."""

SIMULATED = (
    "the times of a simulated runtime say nothing about a card, so no budget is judged on it: say simulated: accept"
    " under performance, or name the runtimes that budgets hold for (runtimes: […])"
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One budget or slowdown, and what is said of it."""

    name: str
    verdict: TimingVerdict

    def plain(self) -> dict[str, Any]:
        """Return plain data."""
        return {"name": self.name, "status": self.verdict.status, "reason": self.verdict.reason}


@dataclass(frozen=True, slots=True)
class TimingBaseline:
    """What a case is compared with: another case that is run beside it, or timings that were stored.

    Attributes:
        name: for messages.
        case: live baseline.
        stored: else its timings.
    """

    name: str
    case: Case | None = None
    stored: Measurement | None = None


def check_performance(case: Case, runtime: Runtime, *, against: bool) -> Performance:
    """Return the budgets that hold for a case on a runtime; all are checked before anything is built.

    Args:
        case: the case; without ``performance``, nothing is judged but a slowdown against a baseline.
        runtime: the runtime.
        against: there is a baseline, so a slowdown is judged.

    Raises:
        ConfigError: a budget on a simulated runtime that is not accepted, or for a duration that the kind has not.
    """
    asked = case.performance or Performance()
    if asked.runtimes is not None and runtime.name not in asked.runtimes:
        return Performance(launches=asked.launches, seconds=asked.seconds, simulated=asked.simulated)
    if capabilities(runtime).simulated and asked.simulated != "accept" and (asked.has_budgets or against):
        raise ConfigError(f"case {case.name!r}: {runtime.name}: {SIMULATED}")
    known = model_kind(case).quantities
    for name, _ in asked.durations():
        if name not in known:
            keys = "p50_ms, p95_ms and p99_ms" if name == "latency" else name
            raise ConfigError(
                f"case {case.name!r}: performance: {keys}: the model kind {case.model!r} has no {name};"
                f" it has {', '.join(known) or 'nothing that can be timed'}"
            )
    return asked


def measure_case(
    pipeline: Pipeline,
    runtime: Runtime,
    settings: Settings,
    *,
    baseline: TimingBaseline | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> Result:
    """Time a case on a runtime and judge it; whatever goes wrong becomes a result.

    Args:
        pipeline: of the case; artifacts are built in this process, and timed in others.
        runtime: the runtime, of settings.
        settings: SDK, cards, threads.
        baseline: what to compare with; None: only budgets are judged.
        prepare: builds what a live baseline opens.
    """
    case = pipeline.case
    base: dict[str, Any] = {"case": case.name, "runtime": runtime.name, "reference": TIMING}
    try:
        missing = runtime.probe()
        if missing:
            return Result(**base, status="not_run", reason=missing)
        base["simulated"] = capabilities(runtime).simulated
        asked = check_performance(case, runtime, against=baseline is not None)
        prepare()
        return _measured(pipeline, runtime, settings, asked, baseline, base)
    except ValidateError as exc:
        stage = "config" if isinstance(exc, ConfigError) else exc.stage or "timing"
        return Result(**base, status="error", reason=str(exc), stage=stage)


def _measured(
    pipeline: Pipeline,
    runtime: Runtime,
    settings: Settings,
    asked: Performance,
    baseline: TimingBaseline | None,
    base: dict[str, Any],
) -> Result:
    case = pipeline.case
    costs = build_costs(pipeline, runtime)
    live = None if baseline is None else baseline.case
    launches = Launches(case, runtime, settings, pipeline.store.root, asked)
    with pipeline.stages.step("timing", runtime.name):
        if live is not None:
            control, both = launches.run([live, live]), launches.run([live, case])
            run = [*control, *both]
        else:
            sides = [case] if baseline is None else [case, case]
            run = both = launches.run(sides)
    measured = Measurement.of_launches(both, len(both[0]["sides"]) - 1, costs)
    states = [launch["machine"] for launch in run]
    disturbed = disturbances(states)
    judgements = list(_budgets(asked, measured, disturbed))
    findings = [f"{name} did not settle in the time of its warm-up" for name in _unsettled(measured)]
    if live is not None:
        pairs = _paired(control, both)
        judgements += [_slowdown(name, *pair, asked.max_slowdown, disturbed) for name, pair in pairs.items()]
    elif baseline is not None:
        assert baseline.stored is not None
        again = Measurement.of_launches(both, 0, costs)
        judgements += list(_against_stored(baseline.stored, again, measured, asked.max_slowdown, disturbed))
    findings += [
        f"only one of baseline and candidate has the workload {name!r}, so it is not compared"
        for name in (both[0]["unpaired"] if live is not None else _missing(baseline, measured))
    ]
    findings += [
        f"{item.name}: faster than {baseline.name if baseline else ''} ({item.verdict.reason}): time for a new baseline"
        for item in judgements
        if item.verdict.improved
    ]
    if disturbed:
        findings.append(f"the machine was not quiet: {disturbed}")
    if base["simulated"]:
        findings.append("these are times of a simulator on a CPU, and no claim about a card")
    status, reason = _overall(judgements, bool(baseline))
    middle = next(iter(measured.workloads.values()))
    return Result(
        **base,
        precision=None,
        status=status,
        reason=reason,
        stage=None if status == "pass" else "timing",
        planned=len(judgements),
        compared=sum(item.verdict.status != "inconclusive" for item in judgements),
        timings_s={
            "median_run": round(float(np.median(middle.seconds)), 6),
            "runs": middle.seconds.size,
            **{name: round(value, 2) for name, value in middle.rates.items() if name == "rows_per_s"},
        },
        findings=tuple(findings),
        performance={
            **measured.plain(),
            "baseline": baseline.name if baseline else None,
            "judgements": [item.plain() for item in judgements],
        },
    )


def _overall(judgements: Sequence[Judgement], compared: bool) -> tuple[Any, str]:
    """Return status and reason; what was only measured is not called a pass."""
    if not judgements:
        missing = "no budget" if compared else "no budget under performance, and no --against"
        return "not_run", f"measured, not judged: there is {missing}"
    for status in ("fail", "inconclusive"):
        found = [f"{item.name}: {item.verdict.reason}" for item in judgements if item.verdict.status == status]
        if found:
            return status, "; ".join(found)
    return "pass", ""


def _unsettled(measured: Measurement) -> Iterator[str]:
    return (name for name, item in measured.workloads.items() if not item.settled)


def _missing(baseline: TimingBaseline | None, measured: Measurement) -> list[str]:
    stored = None if baseline is None else baseline.stored
    return [] if stored is None else sorted(set(stored.workloads) ^ set(measured.workloads))


# --- judging ---------------------------------------------------------------------------------------


def _budgets(asked: Performance, measured: Measurement, disturbed: str) -> Iterator[Judgement]:
    """Yield the judgement of every budget; the slowest bucket decides on a duration, the best one on a rate."""
    for quantity, quantiles in asked.durations():
        of_quantity = [item for item in measured.workloads.values() if item.quantity == quantity]
        for quantile, budget in quantiles.quantiles():
            label = f"{quantity} p{round(quantile * 100)} in ms"
            if not of_quantity:
                yield Judgement(label, TimingVerdict("inconclusive", f"the case has no workload of {quantity}"))
                continue
            worst = max(of_quantity, key=lambda item: float(np.quantile(item.seconds, quantile)))
            label = f"{label} ({worst.name})"
            if worst.seconds.size < least_shots(quantile):
                reason = f"{worst.seconds.size} shots, and it needs {least_shots(quantile)}: raise seconds or launches"
                yield Judgement(label, TimingVerdict("inconclusive", reason))
                continue
            yield Judgement(label, judge_budget(_scaled(worst.quantile(quantile), 1e3), budget * 1e3, disturbed))
    for name, least in asked.rates().items():
        yield _rate(name, least, measured, disturbed)
    for name, budget in asked.costs().items():
        if name not in measured.costs:
            yield Judgement(name, TimingVerdict("inconclusive", "this runtime does not tell it"))
        else:
            value = measured.costs[name]
            sized = name.endswith("_mb")  # a size does not depend on who else computes
            yield Judgement(name, judge_budget(Interval(value, value, value), budget, "" if sized else disturbed))


def _rate(name: str, least: float, measured: Measurement, disturbed: str) -> Judgement:
    """Judge a least rate as a greatest duration, of which rates are the inverse."""
    rated = {item.rates[name]: item for item in measured.workloads.values() if name in item.rates}
    if not rated:
        return Judgement(name, TimingVerdict("inconclusive", "no workload of the case has such a rate"))
    best = rated[max(rated)]
    per_shot = best.rows if name == "rows_per_s" else best.tokens
    interval = _scaled(best.quantile(0.5), 1e3 / per_shot)
    verdict = judge_budget(interval, 1e3 / least, disturbed)
    reason = f"{per_shot / float(np.median(best.seconds)):.4g} per second, least {least:g}; ms each: {verdict.reason}"
    return Judgement(f"{name} ({best.name})", TimingVerdict(verdict.status, reason))


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(interval.low * factor, interval.estimate * factor, interval.high * factor)


def _paired(
    control: Sequence[Mapping[str, Any]], both: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Interval, Interval]]:
    """Return for each workload the intervals of baseline to itself and of candidate to baseline."""
    intervals: list[dict[str, Interval]] = []
    for launches in (control, both):
        first, second = (Measurement.of_launches(launches, side, {}).workloads for side in (0, 1))
        ratios = {name: log_ratios(first[name].seconds, second[name].seconds) for name in second}
        intervals.append({name: median_interval(values) for name, values in ratios.items()})
    return {name: (intervals[0][name], interval) for name, interval in intervals[1].items() if name in intervals[0]}


def _slowdown(name: str, control: Interval, ratio: Interval, limit: float, disturbed: str) -> Judgement:
    return Judgement(f"slowdown of {name}", judge_slowdown(control, ratio, limit, disturbed))


def _against_stored(
    stored: Measurement, again: Measurement, measured: Measurement, limit: float, disturbed: str
) -> Iterator[Judgement]:
    """Yield the judgement of each workload that was stored as well.

    The control is the same statistic between two programs of now, so it has what the kernel adds in noise.
    """
    differing = _differences(stored.fingerprint, measured.fingerprint)
    for name in measured.workloads.keys() & stored.workloads.keys():
        before, now = stored.workloads[name], measured.workloads[name]
        if differing:
            reason = f"the baseline is of another machine or set-up: {differing}"
            yield Judgement(f"slowdown of {name}", TimingVerdict("inconclusive", reason))
            continue
        change = float(np.log(np.median(now.kernel) / np.median(before.kernel)))
        if abs(change) > KERNEL_CHANGE:
            reason = f"a fixed kernel takes {math.expm1(change):+.0%} of its time then: this machine has another speed"
            yield Judgement(f"slowdown of {name}", TimingVerdict("inconclusive", reason))
            continue
        relative = [_relative(item) for item in (before, again.workloads[name], now)]
        control, ratio = unpaired_interval(relative[1], relative[2]), unpaired_interval(relative[0], relative[2])
        yield _slowdown(name, control, ratio, limit, disturbed)


def _relative(item: Timings) -> Any:
    return normalised_levels(item.seconds, item.kernel)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


def build_costs(pipeline: Pipeline, runtime: Runtime) -> dict[str, float]:
    """Build what the runtime opens; return seconds of export and compilation, and size in 10^6 bytes."""
    pipeline.inputs()
    artifact = pipeline.artifact(runtime.kind, capabilities(runtime).sdk)
    stages = {"export": "export_s", "compile": "compile_s"}
    costs = {key: pipeline.seconds[name] for name, key in stages.items() if name in pipeline.seconds}
    size = _size(artifact)
    return costs if size is None else {**costs, "artifact_mb": size / 1e6}


def _size(artifact: Artifact) -> int | None:
    """Return the bytes of an artifact: of a directory all files, of an ONNX file those beside it that hold weights."""
    if artifact.path is None:
        return None
    if artifact.path.is_dir():
        return sum(path.stat().st_size for path in artifact.path.rglob("*") if path.is_file())
    from qeff_validate.builders.external_data import external_files

    files = {artifact.path, *external_files(artifact.path)}
    return sum(path.stat().st_size for path in files if path.is_file())


# --- launching -------------------------------------------------------------------------------------


class Launches:
    """Launches of one case, which share their plan: numbers of rounds and shots, so that results are arrays.

    Args:
        case: the candidate.
        runtime: the runtime; each launch makes its own.
        settings: of the runtime.
        store: root of the artifact store.
        asked: number of launches, seconds, and budgets.
    """

    def __init__(self, case: Case, runtime: Runtime, settings: Settings, store: Path, asked: Performance) -> None:
        self._job = {
            "runtime": runtime.name,
            "settings": {**asdict(settings), "device_ids": list(settings.device_ids)},
            "store": str(store),
            "seconds": asked.seconds,
            "launches": asked.launches,
            "quantile": max((q for _, item in asked.durations() for q, _ in item.quantiles()), default=None),
        }
        self._launches, self._plan = asked.launches, dict[str, Any]()
        self._limit = LAUNCH_SECONDS + settings.run_timeout_s
        self._name = case.name

    def run(self, sides: Sequence[Case]) -> list[dict[str, Any]]:
        """Run the launches of some sides, one after the other; who is opened first takes turns.

        Raises:
            RunError: a process died or did not end in time.
            ValidateError: what it raised.
        """
        results = []
        for at in range(self._launches):
            order = list(range(len(sides)))
            job = {
                **self._job,
                "cases": [side.plain() for side in sides],
                "order": order if at % 2 == 0 else order[::-1],
                "plan": self._plan,
            }
            results.append(run_launch(job, self._limit, self._name))
            self._plan = {item["name"]: item["plan"] for item in results[-1]["workloads"]}
        return results


def run_launch(job: Mapping[str, Any], limit: float, name: str) -> dict[str, Any]:
    """Run one job of `timing_worker` in a new process and return its result.

    Args:
        job: plain data.
        limit: seconds after which the process is killed.
        name: of the case, for messages.

    Raises:
        RunError: the process died or did not end in time.
        ValidateError: what it raised.
    """
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with temporary_folder() as folder, tempfile.TemporaryFile() as printed:
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        files = [str(folder / "job.json"), str(folder / "result.json")]
        child = subprocess.Popen(
            [sys.executable, "-m", WORKER, *files, str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            raise RunError(f"a launch of {name} did not end in {limit:g} s and was killed") from None
        finally:
            if child.poll() is None:
                kill(child)
        if child.returncode:
            printed.seek(0)
            tail = printed.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
            raise RunError("\n".join([f"a launch of {name} {ending(child.returncode)}", *tail]))
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if "error" in result:
        raise getattr(errors, result["error"])(result["text"])
    return result


def stored_measurements(results: Iterable[TimedEntry]) -> dict[tuple[str, str], Measurement]:
    """Return the timings in results or entries of a baseline, by case and runtime; those without any are left out.

    Raises:
        IncomparableError: timings are there and cannot be read.
    """
    found = {}
    for result in results:
        if result.performance:
            try:
                found[result.case, result.runtime] = Measurement.from_plain(result.performance)
            except IncomparableError as exc:
                raise IncomparableError(f"{result.case}-{result.runtime}: {exc}") from exc
    return found
