# SPDX-License-Identifier: Apache-2.0
"""Measure what the table of bounds has to allow: healthy artifacts under several kernels (``make calibrate``, long).

Each variant of `kernels.VARIANTS` is a process. References are computed anew by its kernels, exports are shared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from bounds import HEADROOM
from kernels import ROOT, environment

from qeff_validate.comparison import bounds, logit_metrics
from qeff_validate.engine import Runner, load
from qeff_validate.protocols import Settings, runtime

TABLES = {"embedding": bounds.FALLBACK, "peft-causal-lm": logit_metrics.FALLBACK}
GROUPS = {
    "smollm2": ("configs/peft.yaml", "package:"),
    "minilm": ("configs/quickstart.yaml", "package:"),
    "embeddings": ("configs/embedding.yaml", "random:"),
    "adapters": ("configs/peft.yaml", "random:"),
}
"""Cases that are measured together, by their config and the start of their source."""

EVERY = [case for path in sorted({path for path, _ in GROUPS.values()}) for case in load([ROOT / path])]

PAGE = ROOT / "docs" / "power.md"
HEADING = "## The table of bounds"
TEXT = """
Written by `make calibrate`; the rest of the page is `make power`'s. Healthy artifacts, judged with `tolerance: table`:
cases with a `random:` source of configs/embedding.yaml (exported by TorchScript) and configs/peft.yaml, MiniLM and
SmolLM2, on PyTorch, ONNX Runtime (optimized and not) and the simulated card, under kernels of other processors
(`tests/kernels.py`); the first table says how many of the cases were run under which. *Worst* is over all rows of all
runs; a bound is at least {headroom} times as large in fp32, where kernels differ between processors, and twice in
fp16, where the precision's own noise is nearly all of it.
"""

VARIANTS = ("oldest", "this machine", "AVX2", "MKL compatible", "two threads")
LEVELS = ("disabled", "all")
"""ONNX Runtime's other two levels gave the bits of these in each of the 16 cases where all four were run."""


def main() -> None:
    """Measure, and write the section of docs/power.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "calibration", help="what is measured already")
    parser.add_argument("--group", choices=GROUPS, help="these cases alone")
    parser.add_argument("--variant", choices=VARIANTS, help="this variant alone")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print lines of JSON")
    given = parser.parse_args()
    if given.here:
        for line in measured(given.parts / "store", given.group):
            print(json.dumps({"variant": given.variant, **line}), flush=True)
        return
    for group in [given.group] if given.group else GROUPS:
        for variant in [given.variant] if given.variant else VARIANTS:
            measure(variant, group, given.parts)
    if given.group is None and given.variant is None:
        page = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
        PAGE.write_text(page + section(given.parts), encoding="utf-8")


def measure(variant: str, group: str, parts: Path) -> None:
    """Measure a group under a variant in a process of its own, unless its file is there."""
    file = parts / f"{group}-{variant.replace(' ', '-')}.jsonl"
    if file.is_file():
        return
    shutil.rmtree(parts / "store" / "reference", ignore_errors=True)  # by the kernels of another variant
    parts.mkdir(parents=True, exist_ok=True)
    start, partial = time.monotonic(), file.with_suffix(".part")
    command = [sys.executable, __file__, "--here", "--variant", variant, "--group", group, "--parts", str(parts)]
    with partial.open("w", encoding="utf-8") as out:
        subprocess.run(command, env=environment(variant), stdout=out, check=True)
    partial.rename(file)
    sys.stderr.write(f"{group}, {variant}: {time.monotonic() - start:.0f} s\n")


def measured(store: Path, group: str) -> Iterator[dict[str, Any]]:
    """Yield the value of each gate of each case on each runtime, by the table's bounds."""
    path, source = GROUPS[group]
    for case in load([ROOT / path]):
        if not case.source.startswith(source):
            continue
        changes = {"tolerance": "table"} | ({"exporter": "torchscript"} if case.model == "embedding" else {})
        pipeline = Runner(store=store).pipeline(case.model_copy(update=changes))
        runs = [("torch", None), *(("ort", level) for level in LEVELS), ("sim", None)]
        for name, level in runs:
            result = pipeline.result(runtime(name, Settings(ort_optimization=level)))
            gates = [item for item in result.metrics if item.bound is not None]
            yield {
                "case": case.name,
                "kind": case.model,
                "runtime": name,
                "level": level,
                "precision": result.precision,
                "rows": result.compared,
                "status": result.status,
                "reason": result.reason[:300],
                "values": {item.metric.name: item.metric.value for item in gates},
            }


def section(parts: Path) -> str:
    """Return the section of docs/power.md: false alarms, and the worst value of each metric beside its bound."""
    lines = [json.loads(line) for file in sorted(parts.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    text = [HEADING, TEXT.format(headroom=HEADROOM)]
    text += [
        "| kind | precision | cases | runs under each kernels | failed by the table |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, precision in product(TABLES, ("fp32", "fp16")):
        runs = [line for line in lines if (line["kind"], line["precision"]) == (kind, precision)]
        failed = sum(any(not value <= bound for _, value, bound in judged(line)) for line in runs)
        counts = Counter(line["variant"] for line in runs)
        under = ", ".join(f"{name}: {counts[name]}" for name in VARIANTS if counts[name])
        cases = f"{len({line['case'] for line in runs})} of {sum(case.model == kind for case in EVERY)}"
        text.append(f"| {kind} | {precision} | {cases} | {under} | {failed} of {len(runs)} |")
    text += [
        "",
        "| metric | precision | worst | where | bound | bound / worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    worst: dict[tuple[str, str], tuple[float, str, float]] = {}
    for line in lines:
        for name, value, bound in judged(line):
            key = (name, line["precision"])
            if key not in worst or not value <= worst[key][0]:
                worst[key] = (value, f"{line['case']}, {line['runtime']}, {line['variant']}", bound)
    for (name, precision), (value, where, bound) in sorted(worst.items(), key=lambda item: (item[0][1], item[0][0])):
        text.append(f"| {name} | {precision} | {value:.2g} | {where} | {bound:g} | {bound / value:.1f} |")
    return "\n".join([*text, ""])


def judged(line: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield name, value and today's bound of each metric of the table."""
    bounds = TABLES[line["kind"]][line["precision"]]
    for name, value in line["values"].items():
        metric = name.rpartition(".")[2]
        if metric in bounds:
            yield metric, value, bounds[metric]


if __name__ == "__main__":
    main()
