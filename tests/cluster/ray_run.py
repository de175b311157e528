# SPDX-License-Identifier: Apache-2.0
"""Runs small cases on a Ray cluster of four hosts on this machine, which share nothing but the URL of a store.

On the way a host is lost, a process is killed, and the disk of a host becomes full. One host is slow, has a card, it
says, and, where libfaketime is installed, a clock that is an hour ahead.

python tests/cluster/ray_run.py COUNT FOLDER: prints a JSON object with what came of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from qeff_validate.config.case import Case
from qeff_validate.engine import validate
from qeff_validate.report.result import Result

HOSTS = 4
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
DISK_KB = 4096
"""Of the host whose disk becomes full; it has room for some units."""

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "vocab_size": 97,
}


AHEAD = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def cases(count: int) -> list[Case]:
    """Small bodies, each with weights of its own."""
    return [
        Case(
            name=f"case-{number}",
            source="random:bert",
            config=CONFIG,
            seed=number,
            inputs={"texts": ["a b c", "d e", "the man"]},
            options={"seq_len": [16], "batch_size": 2},
            exporter="torchscript",
            tolerance="table",
            runtimes=["ort", "sim"],
        )
        for number in range(count)
    ]


def small_disk(folder: Path) -> bool:
    """Make a disk of `DISK_KB`; return False if this process may not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KB}k", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def main(count: int, folder: Path) -> dict[str, Any]:
    """Run the cases; after a third of the results a host is lost, after a half a disk is full, then a process dies."""
    homes = [folder / f"host-{number}" for number in range(HOSTS)]
    limited = small_disk(homes[1])
    cluster = Cluster(initialize_head=True, head_node_args=host(homes[0], 0))
    hosts = [cluster.add_node(**host(home, int(number == 2))) for number, home in enumerate(homes) if number]
    (raylet,) = hosts[1].all_processes["raylet"]
    os.setpriority(os.PRIO_PROCESS, raylet.process.pid, 19)  # what it starts gets what the other hosts leave
    made: list[Result] = []
    said: list[str] = []

    def disturb(_case: Case, result: Result) -> None:
        made.append(result)
        if len(made) == 2 * count // 3:
            cluster.remove_node(hosts[-1], allow_graceful=False)
        if len(made) == count and limited:
            with suppress(OSError), open(homes[1] / "full", "wb", buffering=0) as file:
                while True:
                    file.write(b"0" * 4096)
        if len(made) == 4 * count // 3:
            titles = {one.pid: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
            os.kill(next(pid for pid, title in titles.items() if "ray::UnitActor" in title), signal.SIGKILL)

    start = time.perf_counter()
    progress = SimpleNamespace(step=lambda _: nullcontext(), line=said.append)
    report = validate(
        cases(count), store=f"file://{folder}/shared", cluster=cluster.address, on_result=disturb, progress=progress
    )
    seconds = time.perf_counter() - start
    cluster.shutdown()
    built = Counter(path.parent.name for home in homes for path in (home / "onnx").glob("*/provenance.json"))
    if limited:
        subprocess.run(["umount", str(homes[1])], check=True)
    return {
        "statuses": Counter(result.status for result in report.results),
        "reasons": [result.reason for result in report.results if result.status != "pass"],
        "times": Counter(Counter((result.case, result.runtime) for result in made).values()),
        "anew": [note for result in report.results for note in result.notes if "begun anew" in note],
        "lost": said,
        "disk": limited,
        "clock": FAKETIME.exists(),
        "exit code": report.exit_code(),
        "seconds": seconds,
        "graphs": len(built),
    }


def host(home: Path, cards: int) -> dict[str, Any]:
    """Return what a host of the cluster is started with."""
    return {
        "num_cpus": 1,
        "memory": 4_000_000_000,
        "env_vars": {"QEFF_VALIDATE_HOME": str(home), **(AHEAD if cards and FAKETIME.exists() else {})},
        "include_dashboard": False,
        "resources": {"ai100": cards} if cards else {},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))) + "\n")
