# SPDX-License-Identifier: Apache-2.0
"""Measures the timing gate: false alarms on equal programs, and how often a slowdown of 5 % and 10 % is found.

    python tools/timing_gate.py run RECORD --minutes 30     # appends to a file of JSON lines, one comparison each
    python tools/timing_gate.py report RECORD               # prints the table of docs/performance.md

The program is a chain of 40 small layers on ONNX Runtime; a slowdown of 5 % is two layers more. Each comparison is what
`qeff-validate perf --against` does: launches of the baseline against itself, then of the candidate against the baseline,
each launch a process. In every third comparison two further processes compute all the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact
from qeff_validate.comparison.timing import Interval, TimingVerdict, judge_slowdown, log_ratios, median_interval
from qeff_validate.files import temporary_folder
from qeff_validate.pipeline.machine import MachineWatch, disturbances
from qeff_validate.pipeline.timing_worker import Side, time_workload
from qeff_validate.protocols import Settings, Workload
from qeff_validate.runtimes.ort import OrtRuntime

LAYERS = {"baseline": 40, "0 %": 40, "5 %": 42, "10 %": 44}
ROWS, WIDTH = 64, 128
LAUNCHES, SECONDS = 5, 0.6
LIMITS = (0.02, 0.03, 0.05)


def chain(layers: int) -> bytes:
    """Return an ONNX model of so many products with a tanh behind each."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for at in range(layers):
        weight = (random.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{at}"))
        nodes += [helper.make_node("MatMul", [name, f"w{at}"], [f"m{at}"]), helper.make_node("Tanh", [f"m{at}"], [f"t{at}"])]
        name = f"t{at}"
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, [ROWS, WIDTH])] for n in ("x", name))
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def launch(job: dict[str, Any]) -> dict[str, Any]:
    """Open two files and time them in turns, in this process."""
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    workload = {"work": Workload("work", "latency", ({"x": x},))}
    runtime, sides, held = OrtRuntime(Settings(threads=job["threads"])), [], []
    watch = MachineWatch()
    for at in job["order"]:
        context = runtime.open(Artifact("onnx", Path(job["files"][at]), ""))
        held.append(context)
        sides.append((at, Side(context.__enter__(), workload, {})))
    timed = time_workload("work", [side for _, side in sorted(sides, key=lambda item: item[0])], job)
    return {"timed": timed, "machine": watch.stop()}


def launches(files: list[str], threads: int | None, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Time two files in `LAUNCHES` processes, one after the other."""
    results = []
    for at in range(LAUNCHES):
        job = {"files": files, "order": [0, 1] if at % 2 == 0 else [1, 0], "threads": threads, "plan": plan}
        job |= {"seconds": SECONDS, "launches": LAUNCHES, "quantile": None}
        command = [sys.executable, __file__, "launch", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        plan["work"] = results[-1]["timed"]["plan"]
    return results


def round_ratios(results: list[dict[str, Any]]) -> list[list[float]]:
    """Return the log ratio of each round, second file over first, ``[launches][rounds]``."""
    seconds = [np.array([item["timed"]["seconds"][side] for item in results]) for side in (0, 1)]
    return log_ratios(*seconds).round(6).tolist()


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep some processes computing."""
    code = "import numpy as np\na = np.ones((300, 300), np.float32)\nwhile True: a = np.tanh(a @ a)"
    children = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        for _ in range(processes)
    ]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def run(record: Path, minutes: float, threads: int | None) -> None:
    """Append comparisons to a record until the time is over."""
    end = time.monotonic() + minutes * 60
    done = len(record.read_text().splitlines()) if record.exists() else 0
    with temporary_folder() as folder, open(record, "a", encoding="utf-8") as file:
        files = {name: str(folder / f"{at}.onnx") for at, name in enumerate(LAYERS)}
        for name, path in files.items():
            Path(path).write_bytes(chain(LAYERS[name]))
        while time.monotonic() < end:
            loaded, plan, seconds = done % 3 == 2, dict[str, Any](), dict[str, float]()
            row: dict[str, Any] = {"loaded": loaded, "threads": threads, "ratios": {}, "machine": {}, "seconds": seconds}
            # slowdowns in two of three rounds of three, so that equal programs, the rarer event, are seen oftener
            names = ("baseline", "0 %", "5 %", "10 %") if done // 3 % 3 < 2 else ("baseline", "0 %")
            with load(2 if loaded else 0):
                for name in names:
                    start = time.monotonic()
                    results = launches([files["baseline"], files[name]], threads, plan)
                    row["ratios"][name] = round_ratios(results)
                    row["machine"][name] = [item["machine"] for item in results]
                    seconds[name] = round(time.monotonic() - start, 2)
            file.write(json.dumps(row) + "\n")
            file.flush()
            done += 1


def verdicts(row: dict[str, Any], limit: float) -> dict[str, tuple[TimingVerdict, TimingVerdict]]:
    """Return for each candidate what the statistics say alone, and with the rule that a loaded machine is never red."""
    intervals: dict[str, Interval] = {name: median_interval(np.array(ratios)) for name, ratios in row["ratios"].items()}
    made = {}
    for name in intervals.keys() - {"baseline"}:
        disturbed = disturbances([*row["machine"]["baseline"], *row["machine"][name]])
        pair = intervals["baseline"], intervals[name], limit
        made[name] = judge_slowdown(*pair), judge_slowdown(*pair, disturbed)
    return made


def report(record: Path) -> None:
    """Print what a record shows."""
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    took = [row["seconds"]["baseline"] + seconds for row in rows for n, seconds in row["seconds"].items() if n != "baseline"]
    others = [state["others"] for row in rows for states in row["machine"].values() for state in states]
    print(f"{len(rows)} controls, a comparison takes {np.median(took):.0f} s (longest {max(took):.0f} s);")
    print(f"other processes used {np.median(others):.0%} of the processors (median over {len(others)} launches)\n")
    print("| limit | candidate | machine | comparisons | fail | inconclusive | pass | fail where not loaded rule |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for limit in LIMITS:
        for name in ("0 %", "5 %", "10 %"):
            for loaded in (False, True):
                both = [verdicts(row, limit)[name] for row in rows if row["loaded"] is loaded and name in row["ratios"]]
                count = [sum(first.status == status for first, _ in both) for status in ("fail", "inconclusive", "pass")]
                red = sum(second.status == "fail" for _, second in both)
                where = "two processes beside it" if loaded else "as it was"
                print(f"| {limit:.0%} | {name} | {where} | {len(both)} | {' | '.join(map(str, count))} | {red} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
