# SPDX-License-Identifier: Apache-2.0
"""Runs the sample on a tree of the simulated SDK, and judges what it prints by numpy."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE = Path(__file__).with_name("sample.py")


def run_sample(prefix: Path, folder: Path, *options: str, python: str | Path = sys.executable) -> dict[str, Any]:
    """Run it in an isolated process: no PYTHONPATH, no folder of its own on the path."""
    folder.mkdir()
    command = [str(python), "-I", str(SAMPLE), str(prefix), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    outputs: dict[str, Any] = json.loads(done.stdout)
    return outputs


def check(found: dict[str, Any], prefix: Path, version: str) -> None:
    weight = np.arange(-12, 12).reshape(4, 6)
    for run in found["classified"]["runs"]:
        assert run["y"] == np.maximum(np.array(run["x"]) @ weight, 0).tolist()
    assert [len(run["x"]) for run in found["classified"]["runs"]] == [1, 3, 1]
    assert found["classified"]["allowed_shapes"] == [[[1, 4], [1, 6]], [[3, 4], [3, 6]]]
    # 7 + 1, then twice + 2; the state itself was skipped, so it never came to the host
    assert found["counted"] == [{"y": [[value] * 5]} for value in (8.0, 10.0, 12.0)]
    assert found["batched"] == [np.maximum(number * weight.sum(0), 0).tolist() for number in range(8)]
    assert found["device_ids"] == [0]
    assert "QID 0\n\tStatus:Ready\n" in found["query"]
    assert found["tool_version"] == found["xml_version"] == version
    assert found["simulated"] is True
    assert found["library_loaded"] is False
    library, messages = map(Path, found["files"])
    assert prefix / "dev" / "lib" / platform.machine() in library.parents
    assert messages == prefix / "dev" / "python" / "QAicApi_pb2.py"
