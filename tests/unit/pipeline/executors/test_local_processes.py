# SPDX-License-Identifier: Apache-2.0
"""Units in processes: stand-ins that sleep and die, and the real ones beside a run in this process."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from processes import case, cli, config, ended, finish, report_in, said, start, until

from qeff_validate.builders.store import Store
from qeff_validate.cli.options import shard
from qeff_validate.config.case import Case
from qeff_validate.pipeline.executors import local_processes
from qeff_validate.pipeline.executors.local_processes import LocalProcesses
from qeff_validate.pipeline.executors.units import Unit
from qeff_validate.pipeline.executors.worker import UnitServer
from qeff_validate.pipeline.runner import Runner
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Settings
from qeff_validate.report.result import Result


def stub_results(names: list[str], jobs: int, store: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Results of cases on ORT, of workers that only sleep."""
    monkeypatch.setattr(local_processes, "WORKER", "stub_worker")
    executor = LocalProcesses(jobs, Runner().runtime, store=Store(store), settings=Settings(), progress=Silent())
    cases = [Case(name=name, source="random:bert", seed=number) for number, name in enumerate(names)]
    return [result for _, _, result in executor.results([(one, "ort") for one in cases])]


@pytest.mark.integration
def test_unit_that_kills_each_process_is_an_error_with_its_history_and_no_result_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["SIGKILL", *(f"c{number}" for number in range(12)), "SIGSEGV"]
    results = stub_results(names, 3, tmp_path, monkeypatch)
    assert Counter(result.case for result in results) == dict.fromkeys(names, 1)
    reasons = {result.case: result.reason for result in results if result.status != "pass"}
    assert reasons == {
        name: f"its worker was killed by {name} (the last words of a process) (3 times); given up"
        for name in ("SIGKILL", "SIGSEGV")
    }


@pytest.mark.integration
@pytest.mark.parametrize(("cards", "status"), [((4, 7), "pass"), ((4,), "error")])
def test_unit_whose_card_breaks_is_done_on_another_card_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: tuple[int, ...], status: str
) -> None:
    class WithCards(LocalProcesses):
        def is_usable(self, runtime: Any) -> bool:
            return True

        def cards(self, units: Any) -> tuple[int, ...]:
            return cards

    monkeypatch.setattr(local_processes, "WORKER", "stub_worker")
    executor = WithCards(2, Runner().runtime, store=Store(tmp_path), settings=Settings(), progress=Silent())
    cases = [Case(name=f"c{number}", source="random:bert", seed=number) for number in range(4)]
    results = [result for _, _, result in executor.results([(one, "ai100") for one in cases])]
    assert [result.status for result in results] == [status] * 4
    told = [note for result in results for note in result.notes]
    assert told == (["begun anew, because its worker had a broken card"] if status == "pass" else [])


@pytest.mark.parametrize("stage", ["reference", "run"])
def test_worker_tells_that_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = Case(name="c", source="random:bert", tolerance="table", inputs={"texts": ["a", "b", "c d"]})
    sent: list[Any] = []
    job = {"cases": [one.model_dump(mode="json")], "settings": asdict(Settings()), "explain": "off"}
    server = UnitServer({**job, "store": str(tmp_path)}, sent.append)
    request = {"unit": asdict(Unit("c", stage, "torch")), "runtimes": ["torch"], "device_ids": []}
    with monkeypatch.context() as patch:
        patch.setattr("qeff_validate.builders.store.os.replace", full)
        server.do(request)
    assert sent[-1]["fault"] == {"reason": "had no room (No space left on device)", "cards": []}
    fresh = UnitServer({**job, "store": str(tmp_path)}, sent.append)
    fresh.do(request)
    assert sent[-1]["fault"] is None


@pytest.mark.integration
def test_closing_the_results_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_processes, "WORKER", "stub_worker")
    executor = LocalProcesses(2, Runner().runtime, store=Store(tmp_path), settings=Settings(), progress=Silent())
    cases = [Case(name=f"c{number}", source="random:bert", seed=number) for number in range(9)]
    results = executor.results([(one, "ort") for one in cases])
    next(results)
    assert len(workers_of(os.getpid(), "stub_worker")) == 2
    results.close()
    assert workers_of(os.getpid(), "stub_worker") == []


def workers_of(parent: int, module: str = "qeff_validate.pipeline.executors.worker") -> list[int]:
    """The worker processes of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            above = int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if above == parent and module.encode() in command:
            found.append(int(path.name))
    return found


FAST = "exporter: torchscript\ntolerance: table"


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The results of a report without times and places."""
    results = report_in(folder)["results"]
    for result in results:
        del result["timings_s"]
        result["artifact"] = None
    return list(results)


@pytest.mark.integration
@pytest.mark.slow
def test_jobs_give_the_same_report_bit_for_bit_and_resume_makes_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "QAIC_SIM_THREADS"):
        monkeypatch.setenv(name, "1")
    extra = "exporter: torchscript"
    path = config(tmp_path, case(extra=extra), case("second", f"{FAST}\nseed: 3"))
    here, there = ("--report", tmp_path / "here"), ("--report", tmp_path / "there", "-v", "--jobs", "2")
    first = cli("run", path, "--store", tmp_path / "s1", *here, cwd=tmp_path)
    second = cli("run", path, "--store", tmp_path / "s2", *there, cwd=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), said(first) + said(second)
    assert numbers(tmp_path / "here") == numbers(tmp_path / "there")
    assert "[1/6] tiny: reference: running" in second.stderr
    assert "[6/6] " in second.stderr

    lines = (tmp_path / "there" / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 6
    kept = "".join(lines[:2]) + lines[2][:40]  # the machine lost its power while the third was written
    (tmp_path / "there" / "results.jsonl").write_text(kept, encoding="utf-8")
    resumed = ("--report", tmp_path / "there", "-v", "--resume", tmp_path / "there")
    again = cli("run", path, "--store", tmp_path / "s2", *resumed, cwd=tmp_path)
    assert again.returncode == 0, said(again)
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")
    assert len(re.findall(r"load on \w+: running", again.stderr)) == 4, "two of six results are known"
    changed = config(tmp_path, case(extra=extra), case("second", f"{FAST}\nseed: 4"))
    resumed = ("--resume", tmp_path / "there", "--runtimes", "ort")
    anew = cli("run", changed, "--store", tmp_path / "s2", *here, "-v", *resumed, cwd=tmp_path)
    assert anew.stderr.count("load on ort: running") == 1, "the result of a case that has changed is not taken"


@pytest.mark.integration
@pytest.mark.slow
def test_worker_that_is_killed_is_replaced_and_ctrl_c_reports_what_is_done(tmp_path: Path) -> None:
    path = config(tmp_path, case(extra=FAST), case("second", f"{FAST}\nseed: 3"))
    log = tmp_path / "stderr"
    fixed = ("--store", tmp_path / "store", "--report", tmp_path / "report", "--runtimes", "ort", "--jobs", "2", "-v")
    process = start("run", path, *fixed, cwd=tmp_path, stderr=log)
    with ended(process):
        until(lambda: "tiny: export: running" in log.read_text(), "the first case is exported")
        victim = next(pid for pid in workers_of(process.pid) if os.path.exists(f"/proc/{pid}"))
        os.kill(victim, signal.SIGKILL)
        done = finish(process)
    assert done.returncode == 0, log.read_text()
    assert "a worker was killed by SIGKILL; another one takes its work" in log.read_text()
    assert [result["status"] for result in report_in(tmp_path / "report")["results"]] == ["pass", "pass"]

    more = config(tmp_path, case(extra=FAST), case("third", f"{FAST.replace('torchscript', 'dynamo')}\nseed: 5"))
    process = start("run", more, *fixed, "--report", tmp_path / "cut", cwd=tmp_path, stderr=log)
    with ended(process):
        until((tmp_path / "cut" / "report.json").exists, "the case of the store has its result")
        assert (tmp_path / "cut" / "results.jsonl").exists()
        told = {
            result["case"]: (result["status"], result["reason"]) for result in report_in(tmp_path / "cut")["results"]
        }
        assert (told["tiny"][0], told["third"]) == ("pass", ("not_run", "the run has not ended"))
        running = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done.returncode == 130, log.read_text()
    results = {result["case"]: result for result in report_in(tmp_path / "cut")["results"]}
    assert (results["tiny"]["status"], results["third"]["status"]) == ("pass", "not_run")
    assert results["third"]["reason"] == "the run was interrupted"
    assert "1 of 2 results are in" in done.stdout
    assert not any(os.path.exists(f"/proc/{pid}") for pid in running)


def test_shards_merge_into_the_report_of_the_whole(tmp_path: Path) -> None:
    cases = [case(name, FAST) for name in ("a", "b", "c")]
    path = config(tmp_path, *cases)
    for number in (1, 2):
        options = ("--shard", f"{number}/2", "--runtimes", "ai100", "--report", tmp_path / f"r{number}")
        assert cli("run", path, *options, cwd=tmp_path).returncode == 3
    done = cli("merge", "r1", "r2", "--report", "all", cwd=tmp_path)
    assert done.returncode == 3, said(done)
    assert [result["case"] for result in report_in(tmp_path / "all")["results"]] == ["a", "c", "b"]
    twice = cli("merge", "r1", "r1/report.json", "--report", "all", cwd=tmp_path)
    assert twice.returncode == 2
    assert "have a result of a-ai100" in said(twice)


def test_shards_are_each_case_once() -> None:
    cases = [Case(name=f"c{number}", source="random:bert") for number in range(8)]
    shares = [[one.name for one in shard(cases, f"{number}/3")] for number in (1, 2, 3)]
    assert shares == [["c0", "c3", "c6"], ["c1", "c4", "c7"], ["c2", "c5"]]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--shard", "3/2"), "--shard: '3/2' is no share: give K/N with K from 1 to N"),
        (("--shard", "2"), "is no share"),
        (("--shard", "2/2"), "there are 1 cases, so this share has none"),
        (("--jobs", "0"), "--jobs: '0' is no number of processes: give 1 to 1024, or auto"),
        (("--jobs", "many"), "is no number of processes"),
        (("--resume", "nowhere"), "--resume: there is no nowhere/results.jsonl"),
    ],
)
def test_wrong_options_are_wrong_usage(options: tuple[str, ...], text: str, tmp_path: Path) -> None:
    done = cli("run", config(tmp_path), *options, cwd=tmp_path)
    assert done.returncode == 2
    assert text in said(done)


def test_plan_prints_each_unit_as_a_table_and_as_json(tmp_path: Path) -> None:
    path = config(tmp_path)
    shown = cli("plan", path, "--runtimes", "ort", "--store", tmp_path / "store", cwd=tmp_path)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["unit", *["tiny:"] * 4]
    lines = cli("plan", path, "--json", "--runtimes", "ort", "--store", tmp_path / "store", cwd=tmp_path).stdout
    units = [json.loads(line) for line in lines.splitlines()]
    assert [unit["id"] for unit in units] == ["tiny: reference", "tiny: measure", "tiny: export", "tiny: run on ort"]
    assert units[3]["needs"] == [unit["id"] for unit in units[:3]]


def test_cluster_without_ray_names_the_extra(tmp_path: Path) -> None:
    done = cli("run", config(tmp_path), "--cluster", "local", cwd=tmp_path)
    assert (done.returncode, "pip install 'qeff-validate[ray]'" in said(done)) == (3, True), said(done)
