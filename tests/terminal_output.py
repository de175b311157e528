# SPDX-License-Identifier: Apache-2.0
"""The end of a run as terminals show it; ``python tests/terminal_output.py --write`` keeps it in files, to be read."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from report_samples import EXPLANATION

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult, Power, Status
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result

FOLDER = Path(__file__).parent / "unit" / "report" / "terminal"

TERMINALS: dict[str, tuple[int | None, bool]] = {
    "piped": (None, True),
    "80-columns-without-colour": (80, False),
    "80-columns-in-colour": (80, True),
    "200-columns-in-colour": (200, True),
}
"""The width in columns, None for a pipe, and whether colour is wanted."""


MEASURED = Bound(4.8e-6, "floor", "noise", 9.6e-7)


def outcome(case: str, runtime: str, status: Status, value: float, bound: Bound = MEASURED) -> Result:
    worst = {"row": 6, "text": "1234567890 !@#$%^&*()_+-=[]{}|;':\",./<>? \\ `~"}
    gates = (
        GateResult(Metric("output.rel_l2", value, worst), bound),
        GateResult(Metric("output.cosine", value**2 / 2, worst), Bound(bound.value**2 * 20, "floor", "noise", 1e-12)),
        GateResult(Metric("output.neighbour_order", 0.0, worst), Bound(0.0, "exact", "no neighbour moves")),
    )
    return Result(
        case,
        runtime,
        status,
        metrics=gates if status != "error" else (),
        precision="fp16" if runtime == "sim" else "fp32",
        simulated=runtime == "sim",
        planned=33,
        compared=33 if status != "error" else 0,
        power=Power(16) if status == "pass" else None,
        timings_s={"median_run": 0.0123, "rows_per_s": 650.4},
    )


def report() -> Report:
    """A result of each kind that a run may end with."""
    from dataclasses import replace

    wide = Bound(0.9, "case", "the card is new", 9.6e-7)
    failed = outcome("minilm-mean", "sim", "fail", 4e-3)
    broken = "model.safetensors: the file ends after 1,024 of 90,868,376 bytes; fetch it again"
    results = (
        outcome("minilm-mean", "torch", "pass", 1.23e-6),
        replace(
            failed,
            stage="compare",
            reason="output.rel_l2 0.004, allowed 4.8e-06 (floor), worst row 6 ('1234567890 !@#$%^&*()_+-=[]')"
            "; output.1-cosine 8e-06, allowed 4.61e-10 (floor), worst row 6 ('1234567890 !@#$%^&*()_+-=[]')",
            explanation=EXPLANATION,
        ),
        Result("minilm-mean", "ai100", "not_run", "no AI 100 SDK at /opt/qti-aic: install the Platform SDK"),
        replace(outcome("own-bound", "ort", "pass", 0.1, wide), power=Power(16, ("bias", "scale"))),
        replace(
            outcome("other-graph", "ort", "inconclusive", 1e-6),
            reason="2 of 16 faults would pass: bias, scale",
            findings=("a row without a token differs; it changes no other row",),
        ),
        replace(outcome("broken-file", "ort", "error", 0.0), stage="reference", reason=broken),
        replace(outcome("broken-file", "sim", "error", 0.0), stage="reference", reason=broken),
    )
    return Report(results)


def shown(width: int | None, colour: bool) -> str:
    """Return what a process prints of the report into a pipe, or to a terminal so many columns wide."""
    hidden = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"TERM": "xterm-256color"}
    command = [sys.executable, __file__]
    if not colour:
        env["NO_COLOR"] = "1"
    if width is None:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        parts = []
        while part := _read(ours):
            parts.append(part)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    os.close(ours)
    assert process.returncode == 0, errors
    return b"".join(parts).decode().replace("\r\n", "\n")


def _read(number: int) -> bytes:
    try:
        return os.read(number, 65536)
    except OSError:  # how Linux tells the end of a terminal
        return b""


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for name, terminal in TERMINALS.items():
            (FOLDER / f"{name}.txt").write_text(shown(*terminal), encoding="utf-8")
    else:
        from qeff_validate.cli.run import print_closing, print_results

        print_results(report())
        print_closing(report(), Path("qv-report"))
