# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of four hosts on this machine, in an environment with Ray beside what is installed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from processes import case, cli, config, environ, report_in, said

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.environments


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with Ray, which sees the packages of this one."""
    folder = tmp_path_factory.mktemp("ray") / "environment"
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n", encoding="utf-8")
    interpreter = folder / "bin" / "python"
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "ray>=2.50"], check=True)
    return interpreter


def run(python: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**environ(folder), "OMP_NUM_THREADS": "1", "QAIC_SIM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)


def test_lost_host_and_killed_process_lose_no_result_and_double_none(python: Path, tmp_path: Path) -> None:
    count = int(os.environ.get("QV_TEST_CLUSTER_CASES", "12"))
    done = run(python, ROOT / "tests" / "cluster" / "ray_run.py", str(count), tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["statuses"] == {"pass": 2 * count}
    assert told["times"] == {"1": 2 * count}, "each result is made once"
    assert told["exit code"] == 0
    sys.stdout.write(f"{told}\n")


def test_numbers_are_those_of_a_run_in_one_process(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "QAIC_SIM_THREADS"):
        monkeypatch.setenv(name, "1")
    path = config(tmp_path, case(extra="exporter: torchscript"))
    here = cli("run", path, "--store", tmp_path / "s1", "--report", tmp_path / "here", cwd=tmp_path)
    fixed = ("--store", tmp_path / "s2", "--report", tmp_path / "there", "--cluster", "local")
    there = run(python, "-m", "qeff_validate.cli", "run", path, *fixed, folder=tmp_path)
    assert (here.returncode, there.returncode) == (0, 0), said(here) + said(there)
    results = [report_in(tmp_path / name)["results"] for name in ("here", "there")]
    for result in (*results[0], *results[1]):
        del result["timings_s"], result["artifact"]
    assert results[0] == results[1]


def test_address_without_a_cluster_is_wrong_usage(python: Path, tmp_path: Path) -> None:
    fixed = ("--store", tmp_path / "s", "--report", tmp_path / "r", "--cluster", "127.0.0.1:1")
    done = run(python, "-m", "qeff_validate.cli", "run", config(tmp_path), *fixed, folder=tmp_path)
    assert done.returncode == 2
    assert "--cluster: nothing answers at '127.0.0.1:1'" in said(done)
