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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels import ROOT, environment

from qeff_validate.engine import Runner, load
from qeff_validate.protocols import Settings, runtime

GROUPS = {
    "smollm2": ("configs/peft.yaml", "package:"),
    "minilm": ("configs/quickstart.yaml", "package:"),
    "embeddings": ("configs/embedding.yaml", "random:"),
    "adapters": ("configs/peft.yaml", "random:"),
}
"""Cases that are measured together, by their config and the start of their source."""

VARIANTS = ("oldest", "this machine", "AVX2", "MKL compatible", "two threads")
LEVELS = ("disabled", "all")
"""ONNX Runtime's other two levels gave the bits of these in each of the 16 cases where all four were run."""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "calibration", help="what is measured already")
    parser.add_argument("--group", choices=GROUPS, help="these cases alone")
    parser.add_argument("--variant", choices=VARIANTS, help="this variant alone")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print lines of JSON")
    given = parser.parse_args()
    if given.here:
        for line in measured(given.parts / "store", given.group):
            print(json.dumps(line), flush=True)
        return
    for group in [given.group] if given.group else GROUPS:
        for variant in [given.variant] if given.variant else VARIANTS:
            measure(variant, group, given.parts)


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
                "values": {item.metric.name: [item.metric.value, item.bound.value] for item in gates if item.bound},
            }


if __name__ == "__main__":
    main()
