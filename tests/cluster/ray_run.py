# SPDX-License-Identifier: Apache-2.0
"""Runs small cases on a Ray cluster of four hosts on this machine, and loses a host and a process on the way.

python tests/cluster/ray_run.py COUNT FOLDER: prints a JSON object with what came of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from qeff_validate.config.case import Case
from qeff_validate.engine import validate
from qeff_validate.report.result import Result

HOSTS = 4

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "vocab_size": 97,
}


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


def main(count: int, folder: Path) -> dict[str, Any]:
    """Run the cases on the cluster; after a third of the results a host is lost, after two thirds a process."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    hosts = [cluster.add_node(num_cpus=1) for _ in range(HOSTS - 1)]
    made: list[Result] = []

    def disturb(_case: Case, result: Result) -> None:
        made.append(result)
        if len(made) == 2 * count // 3:
            cluster.remove_node(hosts[0], allow_graceful=False)
        if len(made) == 4 * count // 3:
            titles = {one.pid: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
            os.kill(next(pid for pid, title in titles.items() if "ray::UnitActor" in title), signal.SIGKILL)

    start = time.perf_counter()
    report = validate(cases(count), store=folder / "store", cluster=cluster.address, on_result=disturb)
    seconds = time.perf_counter() - start
    cluster.shutdown()
    return {
        "statuses": Counter(result.status for result in report.results),
        "times": Counter(Counter((result.case, result.runtime) for result in made).values()),
        "anew": [note for result in report.results for note in result.notes if "begun anew" in note],
        "exit code": report.exit_code(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))) + "\n")
