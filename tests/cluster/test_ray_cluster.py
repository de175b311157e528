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


def run(python: Path, *arguments: str | Path, folder: Path, limit_s: int = 900) -> subprocess.CompletedProcess[str]:
    env = {**environ(folder), "OMP_NUM_THREADS": "1", "QAIC_SIM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=limit_s, check=False)


def test_lost_host_killed_process_and_full_disk_lose_no_result_and_double_none(python: Path, tmp_path: Path) -> None:
    count = int(os.environ.get("QV_TEST_CLUSTER_CASES", "12"))
    done = run(
        python,
        ROOT / "tests" / "cluster" / "ray_run.py",
        str(count),
        tmp_path,
        folder=tmp_path,
        limit_s=900 + 10 * count,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["statuses"] == {"pass": 2 * count}
    assert told["times"] == {"1": 2 * count}, "each result is made once"
    assert told["exit code"] == 0
    assert not told["disk"] or any("had no room" in line for line in told["lost"]), told["lost"]
    assert told["graphs"] == count
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
    done = run(python, "-m", "qeff_validate.cli", "run", config(tmp_path), *fixed[:-1], "ray://h:1", folder=tmp_path)
    assert (done.returncode, "Ray's client cannot stream" in said(done)) == (2, True), said(done)


PLACES = """
import queue, sys, time
from dataclasses import asdict

import ray
from ray.cluster_utils import Cluster
from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.pipeline.executors.ray_cluster import RayCluster
from qeff_validate.pipeline.executors.units import Unit
from qeff_validate.pipeline.runner import Runner
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Settings

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "memory": 3e9, "include_dashboard": False})
cluster.add_node(num_cpus=2, memory=6e9, resources={"ai100": 2})
runner = Runner()
pool = RayCluster(cluster.address, runner.runtime, store=Store(sys.argv[1]), settings=Settings(), progress=Silent())
runs, compiles, small, large = units = [
    Unit("a", "run", "ai100", cards=1), Unit("a", "compile", "ai100"), Unit("a", "export"), Unit("b", "export")
]
pool.megabytes = {unit.id: size for unit, size in zip(units, (900, 900, 1100, 90_000), strict=True)}
assert pool.is_usable(runner.runtime("ai100")), "the cluster has cards, this host has none"
assert (pool.places(), list(pool.cards(units))) == (4, [0, 1])
job = {"cases": [], "settings": asdict(Settings()), "store": sys.argv[1], "explain": "off"}
workers = [pool.start(number, unit, job, queue.SimpleQueue()) for number, unit in enumerate((runs, small))]
assert workers[0].resources == {"memory": 1e9, "ai100": 1}, workers[0].resources
assert workers[1].resources == {"memory": 2e9}, workers[1].resources
assert [pool.fits(workers[0], unit) for unit in units] == [True, True, False, False]
assert [pool.fits(workers[1], unit) for unit in units] == [False, False, True, False]
assert pool._resources(large) == {"memory": 6e9}, "no host has more"
for _ in range(100):
    if ray.available_resources().get("ai100") == 1:
        break
    time.sleep(0.1)
assert ray.available_resources()["ai100"] == 1
pool.close()
cluster.shutdown()
print("right")
"""


def test_units_declare_their_memory_and_go_to_hosts_that_have_what_they_take(python: Path, tmp_path: Path) -> None:
    done = run(python, "-c", PLACES, tmp_path, folder=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["right"]), done.stderr[-3000:]
