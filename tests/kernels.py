# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for other machines: numeric tests under other kernels, threads and optimizations (``make test-kernels``).

A library chooses its kernels by the processor that it finds; its environment variables make it choose those of an
older one. ``MKL_ENABLE_INSTRUCTIONS`` is not among them: on processors of other makers than Intel it changes no bit.
ONNX Runtime has no such variable, so its stand-ins are optimization levels and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from bounds import HEADROOM

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Prescott",
}

VARIANTS: Mapping[str, Mapping[str, str]] = {
    "this machine": {},
    "two threads": {"OMP_NUM_THREADS": "2", "QAIC_SIM_THREADS": "2"},
    "oldest": OLDEST,
    "AVX2": AVX2,
    "PyTorch AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "PyTorch default": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "MKL AVX2": {"MKL_CBWR": "AVX2"},
    "ORT disabled": {"QEFF_VALIDATE_ORT_OPTIMIZATION": "disabled"},
    "ORT basic": {"QEFF_VALIDATE_ORT_OPTIMIZATION": "basic"},
    "ORT extended": {"QEFF_VALIDATE_ORT_OPTIMIZATION": "extended"},
}
"""What is set beside one thread, by the name of the variant. PyTorch's generator draws other numbers in its default
kernels, so random models have other weights there."""


WHOLE = ("this machine", "two threads", "oldest")
"""Under these, slow tests run as well."""

COLUMNS = "{:<16} {:>6} {:>7} {:>9} {:>6}  {}"


def main() -> None:
    """Run the tests under each variant, print a line for each, and exit with 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=VARIANTS, help="this variant alone (repeatable)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    given = parser.parse_args()
    print(COLUMNS.format("variant", "tests", "failed", "worst", "time", "where (error over bound)"), flush=True)
    failed = False
    chosen = any(Path(argument.partition("::")[0]).exists() for argument in given.pytest)
    arguments = [*given.pytest, *([] if chosen else numeric_files())]
    for variant in given.only or VARIANTS:
        start = time.monotonic()
        passed, report, ratios = run(variant, arguments)
        counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|error)", report)}
        bad = counts.get("failed", 0) + counts.get("error", 0)
        where, worst = max(ratios.items(), key=lambda item: item[1], default=("nothing was compared", float("nan")))
        total = counts.get("passed", 0) + bad
        seconds = f"{time.monotonic() - start:.0f} s"
        print(COLUMNS.format(variant, total, bad, f"{worst:.3f}", seconds, where), flush=True)
        for test, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
            if test != where and not ratio <= 1 / HEADROOM:
                print(
                    COLUMNS.format("", "", "", f"{ratio:.3f}", "", f"{test} (less than {HEADROOM} times)"), flush=True
                )
        if not passed or not ratios:
            failed = True
            print(report, flush=True)
    sys.exit(failed)


def numeric_files() -> list[str]:
    """Return the files with numeric tests; others need not be imported."""
    return [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "numeric" in path.read_text(encoding="utf-8")]


def run(variant: str, arguments: Sequence[str]) -> tuple[bool, str, dict[str, float]]:
    """Return whether pytest was green under a variant, what it printed, and the worst ratio of each test."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratios"
        tests = "numeric" if variant in WHOLE else "numeric and not slow"
        command = [sys.executable, "-m", "pytest", "-m", tests, "-q", "-p", "no:cacheprovider", *arguments]
        child = subprocess.run(
            command,
            env={**environment(variant), "QEFF_TEST_RATIOS": str(file)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        ratios: dict[str, float] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            name, ratio = json.loads(line)
            test = name.partition("[")[0]
            ratios[test] = float(np.maximum(ratios.get(test, 0.0), ratio))  # keeps NaN
    return child.returncode == 0, child.stdout, ratios


def environment(variant: str) -> dict[str, str]:
    """Return the environment of a child that computes as a variant does."""
    one_thread = {"OMP_NUM_THREADS": "1", "QAIC_SIM_THREADS": "1"}
    return {**os.environ, **one_thread, **VARIANTS[variant]}


if __name__ == "__main__":
    main()
