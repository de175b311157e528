# SPDX-License-Identifier: Apache-2.0
"""Ratios of what costs time and memory, each measured in one run, the two sides in turn: ``make bench``.

Prints, writes ``build/bench.json`` and ``docs/performance.md``, and never gates: a loaded machine must not turn a build
red.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_lm
import bench_runs
import numpy as np
from bench_figures import Figure, Measured, Missing, ms, page, paired, peak_above_start, plain

from qeff_validate.pipeline.machine import MachineWatch, machine_fingerprint

ROOT = Path(__file__).resolve().parent.parent


def comparison() -> Iterator[Figure | Missing]:
    """Our row metrics over Polygraphy's SimpleCompareFunc, on two arrays of 100 MB."""
    from qeff_validate.comparison.vector_metrics import row_errors

    a = np.random.default_rng(0).standard_normal((68_266, 384), dtype=np.float32)
    b = a + np.float32(1e-4)
    extra = peak_above_start(lambda: row_errors(a, b))
    yield Figure("comparison of two 100 MB outputs, extra memory", extra, "<= 64", unit="MiB")
    try:
        from polygraphy.comparator import IterationResult, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError:
        yield Missing("comparison over Polygraphy's SimpleCompareFunc", "pip install polygraphy")
        return
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    judge = SimpleCompareFunc()
    one, two = IterationResult({"output": a}, runner_name="a"), IterationResult({"output": b}, runner_name="b")
    ratio, ours, theirs = paired(lambda: row_errors(a, b), lambda: judge(one, two), 3)
    detail = f"{ours:.3f} / {theirs:.2f} s"
    yield Figure("comparison of two 100 MB outputs over Polygraphy's SimpleCompareFunc", ratio, "<= 0.02", detail)


def latency(rows: int = 32, length: int = 64, pairs: int = 30) -> Iterator[Figure]:
    """The simulator over plain ONNX Runtime, MiniLM, same shape and threads."""
    import qeff_validate as qv

    options = {"pooling": "mean", "seq_len": [length], "batch_size": rows}
    model = qv.model(qv.Case(name="bench", source=bench_runs.MINILM, options=options))
    os.environ["QAIC_SIM_THREADS"] = "2"
    settings = qv.Settings(threads=2)
    ids = np.random.default_rng(0).integers(1000, 20000, (rows, length))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with (
        qv.runtime("sim", settings).open(qv.build(model, "qpc")) as sim,
        qv.runtime("ort", settings).open(qv.build(model, "onnx")) as ort,
    ):
        ratio, ours, theirs = paired(lambda: sim.run(feeds), lambda: ort.run(feeds), pairs)
    yield Figure(f"sim over ort, MiniLM [{rows}, {length}]", ratio, "<= 1.15", ms(ours, theirs))


def ensemble() -> Iterator[Figure]:
    """The fp16 ensemble of MiniLM beside a process that keeps a processor busy, over its time alone."""
    import qeff_validate as qv
    from qeff_validate.builders.store import Store
    from qeff_validate.config.case import Precision
    from qeff_validate.pipeline.case_pipeline import Pipeline
    from qeff_validate.pipeline.stages import Silent

    case = qv.Case(name="bench", source=bench_runs.MINILM, options={"pooling": "mean", "seq_len": [32, 64]})

    def seconds() -> float:
        with tempfile.TemporaryDirectory() as store:
            pipeline = Pipeline(case, None, Store(store), Silent(), wrapper=qv.model(case))
            pipeline.exact()
            start = time.perf_counter()
            pipeline.floor(Precision(compute="fp16"))
            return time.perf_counter() - start

    seconds()
    alone = min(seconds() for _ in range(2))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            beside = min(seconds() for _ in range(2))
        finally:
            other.kill()
    detail = f"{beside:.1f} / {alone:.1f} s"
    yield Figure("fp16 ensemble of MiniLM beside a busy process, over alone", beside / alone, "<= 2.5", detail)


def export(times: int = 3) -> Iterator[Figure]:
    """Exports of small models in a process that has exported before, in processor time: ours, and by TorchScript."""
    import qeff_validate as qv
    from qeff_validate.builders.export_onnx import export_onnx

    lora = {"peft_method": "lora", "peft": {"r": 4}}
    for name, case, exporters in (
        ("BERT", qv.Case(name="bench", source="random:bert"), ("dynamo", "torchscript")),
        (
            "Llama with LoRA",
            qv.Case(name="b", model="peft-causal-lm", source="random:llama", options=lora),
            ("dynamo",),
        ),
    ):
        model = qv.model(case)
        graph = model.interface(model.inputs(model.tokenize()))
        module, examples = model.module()
        for exporter in exporters:
            seconds = []
            for _ in range(times + 1):
                with tempfile.TemporaryDirectory() as store:
                    start = time.process_time()
                    export_onnx(module, examples, graph, Path(store), exporter)
                    seconds.append(time.process_time() - start)
            yield Figure(f"export, {name} of two layers, {exporter}", min(seconds[1:]), unit="s of processor time")


BENCHES: dict[str, Callable[[], Iterator[Measured]]] = {
    "comparison": comparison,
    "latency": latency,
    "export": export,
    "ensemble": ensemble,
    "repeated": bench_runs.repeated,
    "measured": bench_runs.measured,
    "validate": bench_runs.validate,
    "smollm2": bench_runs.smollm2,
    "large": bench_runs.large,
    "texts": bench_runs.texts,
    "decode": bench_lm.decode,
    "swap": bench_lm.swap,
    "stages": bench_runs.stages,
}


def others_share(watch: MachineWatch, children: float) -> float:
    """Return the share of all processors' time that was neither this process's nor its children's."""
    state = watch.stop()
    ours = (children_seconds() - children) / (state["seconds"] * (os.cpu_count() or 1))
    return max(0.0, float(state["others"]) - ours)


def children_seconds() -> float:
    """Return the processor time of all children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    """Run all, or those that are named; write the page only of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="default: all, and the page is written")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", help="where figures go")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md of what is named too")
    arguments = parser.parse_args()
    measured: list[Measured] = []
    shares = []
    for name in arguments.names or BENCHES:
        watch, children = MachineWatch(), children_seconds()
        try:
            for each in BENCHES[name]():
                measured.append(each)
                print(each, flush=True)
        except Exception as exc:  # the others are measured all the same
            measured.append(Missing(name, f"{type(exc).__name__}: {exc}"[:200]))
            print(measured[-1], flush=True)
        shares.append(others_share(watch, children))
    machine = {key: value for key, value in machine_fingerprint({}).items() if value}
    machine |= {"used by other processes, median over benches": f"{statistics.median(shares):.0%} of all processors"}
    if arguments.names:
        measured += [Missing(name, "not chosen in this run") for name in BENCHES if name not in arguments.names]
    report = plain(measured, machine)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.page or not arguments.names:
        (ROOT / "docs" / "performance.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
