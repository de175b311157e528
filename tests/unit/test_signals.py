# SPDX-License-Identifier: Apache-2.0
"""A signal at any moment of a run ends it with the exit code of the signal, without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SMALL_BERT, environ

SCRIPT = """
import os, signal, sys

def hook(event, arguments):
    if event == "import" and arguments[0] == {module!r} and pending:
        os.kill(os.getpid(), pending.pop())

pending = [{number}]
sys.addaudithook(hook)
from qeff_validate.cli import main
sys.exit(main(["run", "c.yaml", "--store", "s", "--report", "r"]))
"""

MOMENTS = [(module, signal.SIGINT) for module in ("typer", "rich", "yaml", "pydantic", "numpy", "torch")]
"""What is imported on the way, from the first moment on; some of them swallow exceptions in imports of their own."""


@pytest.mark.parametrize(("module", "number"), [*MOMENTS, ("typer", signal.SIGTERM), ("torch", signal.SIGTERM)])
def test_signal_while_modules_are_loaded_ends_the_run_without_a_traceback(
    module: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"cases:\n  - name: tiny\n{SMALL_BERT}    exporter: torchscript\n    tolerance: table\n    runtimes: [ort]\n",
        encoding="utf-8",
    )
    script = SCRIPT.format(module=module, number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted" in done.stderr
    assert not (tmp_path / "r").exists()


EXEC = """
import os, signal, sys
from qeff_validate.cli import signals

signals.raise_on_signals()
try:
    exec("os.kill(os.getpid(), signal.SIGINT)")  # as torch's exporter does with code that it writes
except KeyboardInterrupt:
    sys.exit(signals.exit_code())
"""


def test_ctrl_c_in_code_that_a_library_executes_keeps_our_exit_code(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(EXEC, encoding="utf-8")
    command = [sys.executable, "-m", "script"]
    done = subprocess.run(command, cwd=tmp_path, env=environ(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
