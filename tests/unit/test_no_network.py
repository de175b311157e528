# SPDX-License-Identifier: Apache-2.0
"""No process of a run opens an internet socket, and none leaves the traces of ONNX Runtime's telemetry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from no_network import SUPPORTED, without_internet
from processes import SMALL_BERT

kernel = pytest.mark.skipif(not SUPPORTED, reason="the filter is written for Linux on x86_64 and aarch64")
FAST = "    exporter: torchscript\n    tolerance: table\n    runtimes: [torch, ort, sim]\n"


@kernel
@pytest.mark.parametrize(("family", "code"), [("UNIX", 0), ("INET", -signal.SIGSYS), ("INET6", -signal.SIGSYS)])
def test_filter_ends_a_process_with_an_internet_socket_and_no_other(family: str, code: int) -> None:
    script = f"import socket; socket.socket(socket.AF_{family})"
    done = subprocess.run([sys.executable, "-c", script], preexec_fn=without_internet(), check=False)
    assert done.returncode == code


@kernel
@pytest.mark.slow
def test_run_on_every_runtime_opens_no_internet_socket_and_has_no_telemetry(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    (tmp_path / "c.yaml").write_text(f"cases:\n  - name: tiny\n{SMALL_BERT}{FAST}", encoding="utf-8")
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, "-m", "qeff_validate.cli", "run", "c.yaml", "--store", "s", "--report", "r"]
    confined = {"env": environment, "preexec_fn": without_internet()}
    done = subprocess.run(command, cwd=tmp_path, **confined, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Proved: ") == 3
    assert not (temporary / ".ses").exists()
    assert not (home / ".cache" / "Microsoft").exists()


@pytest.mark.parametrize("module", ["qeff_validate", "qeff_validate.plugin", "qeff_validate.runtimes.isolation.worker"])
@pytest.mark.parametrize("before", ["", "0"])
def test_telemetry_is_off_in_every_process_that_imports_us(module: str, before: str) -> None:
    script = f"import os, {module}; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": before}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_telemetry_is_off_in_a_copy_of_the_simulated_sdk(tmp_path: Path) -> None:
    from qeff_validate.sdk import simulated

    (tmp_path / "sdk_copy").symlink_to(Path(simulated.__file__).parent)
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    script = "import os, sys, sdk_copy.qpc; print(os.environ['ORT_DISABLE_TELEMETRY'], 'qeff_validate' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 False\n"
