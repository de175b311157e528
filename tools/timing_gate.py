# SPDX-License-Identifier: Apache-2.0
"""Measures the timing gate: false alarms on equal programs, and how often a slowdown of 5 % and 10 % is found.

    python tools/timing_gate.py run RECORD --minutes 30     # appends to a file of JSON lines
    python tools/timing_gate.py report RECORD               # prints the tables of docs/timing-gate.md

The program is a chain of 40 small layers on ONNX Runtime; a slowdown of 5 % is two layers more. Each line of the record
is a control (launches of the baseline against itself) and the comparisons that follow it; each launch is a process.
What differs from `qeff-validate perf --against`: the three candidates are open in the same launches, one after the
other beside the baseline, which saves starting processes. In every third line two further processes compute all along.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact
from qeff_validate.comparison.timing import TimingVerdict, judge_slowdown, log_ratios, median_interval
from qeff_validate.files import temporary_folder
from qeff_validate.pipeline.machine import MachineWatch, disturbances
from qeff_validate.pipeline.rounds import Side, time_workload
from qeff_validate.protocols import Settings, Workload
from qeff_validate.runtimes.ort import OrtRuntime

LAYERS = {"0 %": 40, "5 %": 42, "10 %": 44}
"""Of the candidates; the baseline has as many as the first."""

BASELINE = "0 %"
ROWS, WIDTH = 64, 128
LAUNCHES, SECONDS = 5, 0.4
LIMITS = (0.02, 0.03, 0.05)
DRAWN = 300
"""Comparisons of equal programs that the report makes of recorded launches."""


def chain(layers: int) -> bytes:
    """Return an ONNX model of so many products with a tanh behind each."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for at in range(layers):
        weight = (random.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{at}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{at}"], [f"m{at}"]))
        nodes.append(helper.make_node("Tanh", [f"m{at}"], [f"t{at}"]))
        name = f"t{at}"
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, [ROWS, WIDTH])] for n in ("x", name))
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def launch(job: dict[str, Any]) -> dict[str, Any]:
    """Open the baseline and the candidates of a job, and time each beside the baseline, in this process."""
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    names = [f"candidate {at}" for at in range(1, len(job["files"]))]
    workloads = {name: Workload(name, "latency", ({"x": x},)) for name in names}
    runtime, sides = OrtRuntime(Settings(threads=job["threads"])), {}
    watch = MachineWatch()
    with ExitStack() as held:
        for at in job["order"]:
            session = held.enter_context(runtime.open(Artifact("onnx", Path(job["files"][at]), "")))
            sides[at] = Side(session, workloads, {})
        timed = [time_workload(name, [sides[0], sides[at]], job) for at, name in enumerate(names, start=1)]
    return {"timed": timed, "machine": watch.stop()}


def compare(files: list[str], threads: int | None) -> tuple[list[list[list[float]]], list[Any]]:
    """Time candidates beside a baseline in `LAUNCHES` processes, one after the other.

    Returns:
        For each candidate the log ratio of each round, ``[candidates][launches][rounds]``, and what the launches saw of
        the machine.
    """
    results: list[dict[str, Any]] = []
    plan: dict[str, Any] = {}
    for at in range(LAUNCHES):
        order = list(range(len(files)))
        job = {"files": files, "order": order if at % 2 == 0 else order[::-1], "threads": threads, "plan": plan}
        job |= {"seconds": SECONDS, "launches": LAUNCHES, "quantile": None}
        command = [sys.executable, __file__, "launch", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        plan |= {item["name"]: item["plan"] for item in results[-1]["timed"]}
    ratios = []
    for at in range(len(files) - 1):
        of_launches = [result["timed"][at] for result in results]
        rounds = min(len(item["kernel"]) for item in of_launches)
        seconds = [np.array([item["seconds"][side][:rounds] for item in of_launches]) for side in (0, 1)]
        ratios.append(log_ratios(*seconds).round(6).tolist())
    return ratios, [result["machine"] for result in results]


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep some processes computing."""
    code = "import numpy as np\na = np.ones((300, 300), np.float32)\nwhile True: a = np.tanh(a @ a)"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(processes)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def run(record: Path, minutes: float, threads: int | None) -> None:
    """Append to a record until the time is over."""
    record.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + minutes * 60
    done = len(record.read_text().splitlines()) if record.exists() else 0
    with temporary_folder() as folder, open(record, "a", encoding="utf-8") as file:
        files = {name: str(folder / f"{at}.onnx") for at, name in enumerate(LAYERS)}
        for name, path in files.items():
            Path(path).write_bytes(chain(LAYERS[name]))
        while time.monotonic() < end:
            loaded, start = done % 3 == 2, time.monotonic()
            with load(2 if loaded else 0):
                control, before = compare([files[BASELINE], files[BASELINE]], threads)
                took = time.monotonic() - start
                ratios, beside = compare([files[BASELINE], *files.values()], threads)
            row = {"loaded": loaded, "threads": threads, "control": control[0], "control_seconds": round(took, 2)}
            row |= {"ratios": dict(zip(LAYERS, ratios, strict=True)), "machine": [*before, *beside]}
            file.write(json.dumps(row) + "\n")
            file.flush()
            done += 1


def verdict(control: Any, ratios: Any, limit: float, disturbed: str = "") -> TimingVerdict:
    """Return what the gate says of the log ratios of control and candidate, ``[launches, rounds]``."""
    return judge_slowdown(median_interval(np.array(control)), median_interval(np.array(ratios)), limit, disturbed)


def drawn(rows: list[dict[str, Any]], limit: float) -> Counter[str]:
    """Return the states of `DRAWN` comparisons of equal programs, of recorded launches.

    Control and candidate get five launches each, drawn without repetition from all launches of equal programs that were
    recorded under the same load; a third of the comparisons are of those with two processes beside them.
    """
    random, states = np.random.default_rng(0), Counter[str]()
    pools = {}
    for loaded in (False, True):
        launches = [r for row in rows if row["loaded"] is loaded for r in (*row["control"], *row["ratios"][BASELINE])]
        rounds = min(map(len, launches), default=0)
        pools[loaded] = np.array([ratios[:rounds] for ratios in launches])
    for at in range(DRAWN):
        pool = pools[at % 3 == 2]
        chosen = pool[random.choice(len(pool), 2 * LAUNCHES, replace=False)]
        states[verdict(chosen[:LAUNCHES], chosen[LAUNCHES:], limit).status] += 1
    return states


def report(record: Path) -> None:
    """Print what a record shows."""
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    took = [2 * row["control_seconds"] for row in rows]
    others = [state["others"] for row in rows for state in row["machine"]]
    quiet = [not disturbances(row["machine"]) for row in rows]
    print(f"{len(rows)} lines, threads {rows[0]['threads']}; control and comparison take {np.median(took):.0f} s")
    print(f"(longest {max(took):.0f} s); others used {np.median(others):.0%} of the processors (median of launches,")
    print(f"{min(others):.0%} to {max(others):.0%}); {sum(quiet)} lines were quiet by the rule\n")
    print(
        "| limit | candidate | load | comparisons | fail | inconclusive | pass | fail by the rule for loaded machines |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for limit in LIMITS:
        for name in LAYERS:
            for loaded in (False, True):
                chosen = [row for row in rows if row["loaded"] is loaded]
                states = Counter(verdict(row["control"], row["ratios"][name], limit).status for row in chosen)
                red = sum(
                    verdict(row["control"], row["ratios"][name], limit, disturbances(row["machine"])).status == "fail"
                    for row in chosen
                )
                counts = " | ".join(str(states[status]) for status in ("fail", "inconclusive", "pass"))
                where = "two processes beside it" if loaded else "as it was"
                print(f"| {limit:.0%} | {name} | {where} | {len(chosen)} | {counts} | {red} |")
    if len(quiet) < 2 * LAUNCHES:
        return  # too few launches to draw from
    print(f"\n{DRAWN} comparisons of equal programs, of recorded launches:")
    for limit in LIMITS:
        print(f"limit {limit:.0%}: {dict(drawn(rows, limit))}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("run", "report", "launch"))
    parser.add_argument("what", help="the record, or a job")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=None, help="of ONNX Runtime; default: its own choice")
    given = parser.parse_args()
    if given.do == "launch":
        print(json.dumps(launch(json.loads(given.what))))
    elif given.do == "run":
        run(Path(given.what), given.minutes, given.threads)
    else:
        report(Path(given.what))


if __name__ == "__main__":
    main()
