# SPDX-License-Identifier: Apache-2.0
"""Failing cards on the command line: a status, a reason and an exit code; other cases and runtimes still run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sdk_prefix
from processes import alive, case, cli, config, ended, first_run, kill_leftovers, report_in, said, start, until
from simulated_graphs import altered

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qpc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the compiled QPC of the small case; the session's store has its other artifacts too."""
    _, report = first_run(tmp_path_factory.getbasetemp() / "first-run")
    (path,) = (result["artifact"]["path"] for result in report["results"] if result["runtime"] == "sim")
    return Path(path)


def results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(result["case"], result["runtime"]): result for result in report_in(folder / "qv-report")["results"]}


FAULTS = {
    "no-devices": ("load", ["lists no card: is one fitted, and is the driver loaded?"]),
    "device-error": ("load", ["no card is Ready (QID 0 Error)", "group qaic", "qaic-util -s"]),
    "device-initializing": ("load", ["no card is Ready (QID 0 Initializing)", "wait for one"]),
    "activate-nsp": (
        "load",
        ["activate failed with QS_DEV_ERROR", "the QPC needs 16 cores", "0 of 16 cores", "fewer num_cores",
         "| Device 0 activate failed: Memory resource exhausted: 16 NSPs are needed, 0 of 16 are free"],
    ),
    "activate-dram": ("load", ["activate failed with QS_DEV_ERROR", "1 MB for its file alone", "0 of 32768 MB free"]),
    "timeout@2": ("run", ["QS_TIMEDOUT in run 2", "raise the limits in /sys/module/qaic/parameters",
                          "| failed to receive response from NW: Connection timed out (device 0)"]),
    "device-lost@2": ("run", ["QS_DEV_ERROR in run 2", "the card was lost", "| device lost: finish failed status 300"]),
    "crc@2": ("run", ["QS_DATA_CRC_ERROR in run 2", "run again", "PCIe", "| data CRC error (device 0)"]),
    "timeuot": ("load", ["qaic-util -q failed with exit code 1", "unknown fault 'timeuot'; the faults are no-devices"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_an_error_with_values_and_advice_and_another_runtime_keeps_its_result(
    fault: str, qpc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_SIM_FAULT", fault)
    done = cli("run", config(tmp_path), "--runtimes", "sim,ort", cwd=tmp_path)
    assert done.returncode == 3, said(done)
    stage, words = FAULTS[fault]
    by_case = results(tmp_path)
    result = by_case["tiny", "sim"]
    assert (result["status"], result["stage"], result["metrics"]) == ("error", stage, [])
    assert [text for text in words if text not in result["reason"]] == []
    if result["reason"].startswith(("activate", "waitForCompletion")):
        assert f"{qpc} on card 0" in result["reason"]
    assert "Traceback" not in done.stdout + done.stderr
    assert words[0] in done.stdout
    assert by_case["tiny", "ort"]["status"] == "pass"


def test_missing_property_changes_nothing(qpc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAIC_SIM_FAULT", "missing-property=dataPathTimeoutMs")
    done = cli("run", config(tmp_path), "--runtimes", "sim", cwd=tmp_path)
    assert done.returncode == 0, said(done)


def test_qpc_that_does_not_fit_is_named_with_what_to_do_and_the_next_case_passes(qpc: Path, tmp_path: Path) -> None:
    whole = (qpc / "programqpc.bin").read_bytes()
    for name, content in {"cut": whole[:-9], "foreign": (0x00A1CD7C).to_bytes(4, "little") + whole}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "programqpc.bin").write_bytes(content)
    altered(str(qpc), tmp_path / "newer", hw_version="ai200")
    shutil.copytree(qpc, tmp_path / "whole")
    names = ("cut", "foreign", "newer", "whole")
    path = config(tmp_path, *(case(name, f"artifacts: {{qpc: {name}}}") for name in names))
    done = cli("run", path, "--runtimes", "sim", cwd=tmp_path)
    assert done.returncode == 3, said(done)
    by_case = {name: result for (name, _), result in results(tmp_path).items()}
    assert [by_case[name]["status"] for name in names] == ["error", "error", "error", "pass"]
    for name, words in {
        "cut": "must be compiled again",
        "foreign": "must be compiled again",
        "newer": "compile it with the aic_hw_version of this one",
    }.items():
        assert f"{tmp_path / name} on card 0" in by_case[name]["reason"]
        assert words in by_case[name]["reason"]
    assert "HW Version incompatible, program expects:Major Version 3 (ai200)" in by_case["newer"]["reason"]
    assert "Traceback" not in done.stdout + done.stderr


def test_wrong_number_of_ids_is_wrong_usage(qpc: Path, tmp_path: Path) -> None:
    done = cli("run", config(tmp_path), "--runtimes", "sim", "--device-ids", "0,1", cwd=tmp_path)
    assert done.returncode == 2, said(done)
    assert f"{qpc} is compiled for 1 card, and --device-ids names 2 (0, 1)" in said(done)


def test_crash_is_an_error_that_names_the_signal_and_the_next_case_passes(
    qpc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_SIM_FAULT", "crash@2")
    other = case("other").replace("batch_size: 2", "batch_size: 4")  # all its rows fit into one run
    done = cli("run", config(tmp_path, case(), other), "--runtimes", "sim,ort", cwd=tmp_path)
    assert done.returncode == 3, said(done)
    by_case = results(tmp_path)
    assert {key: result["status"] for key, result in by_case.items()} == {
        ("tiny", "sim"): "error", ("tiny", "ort"): "pass", ("other", "sim"): "pass", ("other", "ort"): "pass",
    }  # fmt: skip
    crashed = by_case["tiny", "sim"]
    assert (crashed["stage"], crashed["simulated"], crashed["metrics"]) == ("run", True, [])
    assert f"the process of sim was killed by SIGSEGV in run 2 of {qpc}" in crashed["reason"]
    assert "Traceback" not in done.stdout + done.stderr


# --- hangs and interruptions -------------------------------------------------------------------------------

HANGS = (
    sdk_prefix.QAICRT
    + """
import os, pathlib, signal
from qeff_validate.sdk.simulated.bindings import qaicrt as base


class ExecObj(base.ExecObj):
    def waitForCompletion(self):
        ours = pathlib.Path(__file__).parents[3] / "hanging"
        ours.with_suffix(".new").write_text(str(os.getpid()))
        ours.with_suffix(".new").rename(ours)
        signal.pause()
"""
)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Path]:
    """The prefix of an SDK whose card never answers, and which records the waiting process in ``hanging``."""
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=HANGS)
    yield prefix
    kill_leftovers([pid for pid in [waiting(prefix)] if pid])


def waiting(prefix: Path) -> int:
    return int((prefix / "hanging").read_text()) if (prefix / "hanging").exists() else 0


def arguments(qpc: Path, prefix: Path, folder: Path) -> tuple[str | Path, ...]:
    path = config(folder, case("stuck", f"artifacts: {{qpc: {json.dumps(str(qpc))}}}"))
    return "run", path, "--runtimes", "ai100,ort", "--sdk", prefix


def test_card_that_never_answers_is_an_error_and_the_run_goes_on(qpc: Path, hanging: Path, tmp_path: Path) -> None:
    done = cli(*arguments(qpc, hanging, tmp_path), "--run-timeout", "0.5", cwd=tmp_path)
    assert done.returncode == 3, said(done)
    by_case = results(tmp_path)
    stuck = by_case["stuck", "ai100"]
    assert (stuck["status"], stuck["stage"]) == ("error", "run")
    assert f"ai100 did not answer for 0.5 s in run 1 of {qpc}, so its process was killed" in stuck["reason"]
    assert not alive(waiting(hanging))
    assert by_case["stuck", "ort"]["status"] == "pass"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=str,
)
def test_run_that_is_ended_from_outside_leaves_no_process(
    number: signal.Signals, code: int, qpc: Path, hanging: Path, tmp_path: Path
) -> None:
    process = start(*arguments(qpc, hanging, tmp_path), cwd=tmp_path)
    with ended(process):
        pid = until(lambda: waiting(hanging), "the card is asked")
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == code
    until(lambda: not alive(pid), "the process behind the runtime is gone")
