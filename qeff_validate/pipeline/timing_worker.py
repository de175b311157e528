# SPDX-License-Identifier: Apache-2.0
"""One launch: a process that opens one or two programs, warms them up, and times them in turn (A B B A).

python -m qeff_validate.pipeline.timing_worker JOB RESULT PARENT

The job is a JSON file (`performance.Launch`), so is the result. All artifacts are in the store already.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qeff_validate import errors
from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.errors import IncomparableError, ValidateError
from qeff_validate.memory import end_without_collection
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.machine import (
    MachineWatch,
    machine_fingerprint,
    reset_resident_peak,
    resident_mb,
    resident_peak_mb,
)
from qeff_validate.pipeline.rounds import Side, time_workload
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Runtime, Settings, Timed, capabilities, model_kind, runtime
from qeff_validate.runtimes.qaic_cards import shared_cards
from qeff_validate.sdk.processes import bound_to_parent


def launch(job: Mapping[str, Any]) -> dict[str, Any]:
    """Open, warm up and time what a job names; return plain data.

    Raises:
        ValidateError: a program cannot be opened or fails in a run, or two programs have no workload in common.
    """
    # what is timed is what is deployed: large weights too are in memory, in the layout of the kernels
    settings = replace(Settings.from_plain(job["settings"]), packed_weights=True)
    cases = [Case.model_validate(plain) for plain in job["cases"]]
    opened: dict[int, Side] = {}
    watch = MachineWatch()
    with shared_cards(), ExitStack() as held:
        for at in job["order"]:  # who is opened first lies elsewhere in memory, so launches take turns
            side = _side(cases[at], runtime(job["runtime"], settings), Path(job["store"]))
            opened[at] = held.enter_context(side)
        sides = [opened[at] for at in sorted(opened)]
        common = [name for name in sides[-1].workloads if all(name in side.workloads for side in sides)]
        if not common:
            listed = " and ".join(str(list(side.workloads)) for side in sides)
            raise IncomparableError(f"baseline and candidate have no workload in common: {listed}")
        timed = [time_workload(name, sides, job) for name in common]
    return {
        "sides": [dict(side.facts) for side in sides],
        "opened_first": job["order"][0],
        "workloads": timed,
        "unpaired": sorted({name for side in sides for name in side.workloads} - set(common)),
        "machine": watch.stop(),
        "fingerprint": machine_fingerprint(job["settings"]),
    }


@contextmanager
def _side(case: Case, runtime: Runtime, store: Path) -> Iterator[Side]:
    kind = model_kind(case)
    pipeline = Pipeline(case, kind.options.model_validate(case.options), Store(store), Silent())
    inputs, model = pipeline.inputs(), pipeline.model()
    if not isinstance(model, Timed):
        raise IncomparableError(f"the model kind {case.model!r} says not what to time: give its model `workloads`")
    if runtime.kind != "module":  # looking it up in the store is no part of opening it; loading a module is
        pipeline.artifact(runtime.kind, capabilities(runtime).sdk)
    reset_resident_peak()
    memory, device, start = resident_mb(), _device_free(runtime), time.perf_counter()
    with pipeline.session(runtime) as session:
        loaded = time.perf_counter() - start
        workloads = {workload.name: workload for workload in model.workloads(session, inputs)}
        side = Side(session, workloads, {})
        for name in workloads:  # memory is taken by the first run, not by opening
            side.prepare(name)
            side.shots(name, 1)
        peak, free = resident_peak_mb(), _device_free(runtime)
        side.facts = {
            "load_s": loaded,
            "host_mb": None if peak is None or memory is None else max(peak - memory, 0.0),
            "device_mb": None if device is None or free is None else max(device - free, 0.0),
        }
        yield side


def _device_free(runtime: Runtime) -> float | None:
    """Return the free memory of all cards, in 10^6 bytes; None where no SDK tells (card-contract §1.4)."""
    able = capabilities(runtime)
    if able.sdk is None or able.simulated:
        return None
    values = [card.values.get("Dram Free", "").split() for card in able.sdk.cards()]
    numbers = [float(value[0]) for value in values if value and value[0].replace(".", "", 1).isdigit()]
    return sum(numbers) if numbers else None


def main(arguments: Sequence[str]) -> int:
    """Run the job in a file and write its result, or the error, into another."""
    job, result, parent = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    if not bound_to_parent(parent):
        return 1
    end_without_collection()
    try:
        made = launch(json.loads(job.read_text(encoding="utf-8")))
    except ValidateError as exc:
        known = next(cls for cls in type(exc).__mro__ if getattr(errors, cls.__name__, None) is cls)
        made = {"error": known.__name__, "text": str(exc)}
    result.write_text(json.dumps(made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
