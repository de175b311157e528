# SPDX-License-Identifier: Apache-2.0
"""The command line as a process: exit codes, messages, the report, and what is left behind when things go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sdk_prefix
from processes import (
    alive,
    case,
    cli,
    config,
    copied_store,
    ended,
    environ,
    finish,
    first_run,
    kill_leftovers,
    report_in,
    said,
    start,
    unfinished,
    until,
)

pytestmark = pytest.mark.integration

HERE = Path(__file__).resolve()
RESULT_KEYS = {
    "case", "runtime", "reference", "precision", "simulated", "status", "reason", "stage", "metrics", "coverage",
    "timings_s", "artifact",
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory):
    return first_run(tmp_path_factory.getbasetemp() / "first-run")


@pytest.fixture
def store(first, tmp_path: Path) -> Path:
    """A store of the test's own that holds all but the QPC."""
    return copied_store(tmp_path)


def run_on(prefix: Path, store: Path, folder: Path, extra: str = "", *options: str):
    """Start a run on the card of a prefix."""
    path = config(folder, case(extra=extra))
    fixed = ("--sdk", prefix, "--store", store, "--report", folder / "report")
    return start("run", path, "--runtimes", "ai100", *fixed, *options, cwd=folder)


# --- what it teaches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("run", ["CONFIG", "--case", "--runtimes", "--require", "--device-ids", "--sdk", "--report", "--store",
                 "--allow-inconclusive", "Exit codes: 0", "1 a mismatch", "2 wrong usage", "3 an error", "130"]),
        ("list", ["CONFIG", "List the cases", "Exit codes: 0", "2 one of them is not"]),
        ("doctor", ["--sdk", "--store", "which runtimes can be used here"]),
        ("schema", ["JSON Schema"]),
    ],
)  # fmt: skip
def test_help_of_each_command_names_its_options_and_exit_codes(command: str, named: list[str], tmp_path: Path) -> None:
    done = cli(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert [text for text in named if text not in said(done)] == []


def test_help_names_every_command_and_what_each_exit_code_means(tmp_path: Path) -> None:
    done = cli("--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in (" run ", " list ", " doctor ", " schema ", "Exit codes: 0", "· 1 ", "· 2 ", "· 3 ", "· 130 "):
        assert text in said(done)


def test_schema_prints_what_lies_in_configs_for_editors(tmp_path: Path) -> None:
    done = cli("schema", cwd=tmp_path)
    kept = HERE.parents[2] / "configs" / "schema.json"
    assert done.returncode == 0
    assert done.stdout == kept.read_text(encoding="utf-8"), "stale: qeff-validate schema > configs/schema.json"


def test_list_shows_each_case_with_its_source_and_runtimes(tmp_path: Path) -> None:
    done = cli("list", config(tmp_path, case("one"), case("two", "runtimes: [ort]")), cwd=tmp_path)
    assert done.returncode == 0
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert rows["one"][1:4] == ["embedding", "random:bert", "torch,ort,sim"]
    assert rows["two"][1:4] == ["embedding", "random:bert", "ort"]


def test_doctor_says_which_runtimes_are_usable_and_why_the_card_is_not(tmp_path: Path) -> None:
    done = cli("doctor", "--store", tmp_path / "here", cwd=tmp_path)
    lines = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert done.returncode == 0
    assert {"torch usable", "ort usable", "sim usable"} <= lines
    assert f"directory {tmp_path / 'here'}" in lines
    missing = [line for line in lines if line.startswith("ai100 ")]
    assert len(missing) == 1
    assert f"no AI 100 SDK at {tmp_path / 'no-sdk'}" in missing[0]
    assert "--sdk" in missing[0]


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_passes_on_torch_ort_and_sim_and_only_sim_is_simulated(first) -> None:
    done, report = first
    assert done.returncode == 0, said(done)
    found = {result["runtime"]: (result["status"], result["simulated"]) for result in report["results"]}
    assert found == {"torch": ("pass", False), "ort": ("pass", False), "sim": ("pass", True)}


@pytest.mark.slow
def test_report_json_has_the_documented_schema(first) -> None:
    _, report = first
    assert report["schema"] == 1
    assert {"versions", "sdk", "cards", "host"} <= set(report["environment"])
    assert report["summary"] | {"pass": 3, "results": 3, "rows_compared": 12} == report["summary"]
    for result in report["results"]:
        assert set(result) >= RESULT_KEYS
        assert result["coverage"] == {"planned": 4, "compared": 4}
        assert len(result["artifact"]["digest"]) == 64
        assert {"load", "first_run", "median_run", "rows_per_s"} <= set(result["timings_s"])
        gates = {metric["name"]: metric for metric in result["metrics"] if metric["bound"] is not None}
        assert {f"output.{name}" for name in ("rel_l2", "cosine", "norm_ratio", "max_abs_rms")} <= set(gates)
        for metric in gates.values():
            assert set(metric) >= {"name", "value", "bound", "source", "floor", "over_bound", "worst", "passed"}
            assert metric["passed"] is True
            if metric["name"] in ("output.mean_signed", "output.mean_norm"):
                assert (metric["worst"]["rows"], result["runtime"]) == (3, "sim"), "of the rows that hold a token"
            else:
                assert metric["worst"]["text"] in ("a b c", "d e", "the man", "(a row without a token)")
        assert {"output.mean_signed", "output.mean_norm"} <= set(gates) or result["runtime"] != "sim"
        power = result["power"]
        assert (power["caught"], power["share"]) == (power["tried"], 1.0), power
    assert [result["precision"] for result in report["results"]] == ["fp32", "fp32", "fp16"]


@pytest.mark.slow
def test_last_lines_of_a_run_say_what_was_proved_and_what_was_not(first) -> None:
    done, _ = first
    lines = done.stdout.splitlines()[-4:]
    assert [line.split()[:2] for line in lines[:3]] == [["Proved:", name] for name in ("torch", "ort", "sim,")]
    assert lines[3].startswith("Not proved: anything on a real AI 100 card")


@pytest.mark.slow
@pytest.mark.parametrize(("required", "code"), [((), 0), (("--require", "ai100"), 3)])
def test_missing_card_is_not_run_with_the_reason_and_an_error_only_if_required(
    first, required: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    done = cli("run", config(tmp_path), "--runtimes", "ort,ai100", *required, cwd=tmp_path)
    assert done.returncode == code, said(done)
    result = report_in(tmp_path / "qv-report")["results"][1]
    assert (result["status"], result["metrics"], result["simulated"]) == ("not_run", [], False)
    assert result["reason"].startswith(f"no AI 100 SDK at {tmp_path / 'no-sdk'}")
    assert f"tiny-ai100: not_run: {result['reason']}" in done.stdout


def test_run_in_which_nothing_was_compared_is_no_success(tmp_path: Path) -> None:
    done = cli("run", config(tmp_path), "--runtimes", "ai100", cwd=tmp_path)
    assert done.returncode == 3
    assert "Proved:" not in done.stdout
    assert report_in(tmp_path / "qv-report")["summary"]["rows_compared"] == 0


@pytest.mark.slow
def test_mismatch_exits_1_and_names_metric_value_bound_and_worst_row(first, tmp_path: Path) -> None:
    strict = "tolerance: {ort: {rel_l2: 0, why: no rounding at all is allowed}}"
    done = cli("run", config(tmp_path, case(extra=strict)), "--runtimes", "ort", cwd=tmp_path)
    assert done.returncode == 1, said(done)
    (result,) = report_in(tmp_path / "qv-report")["results"]
    metric = next(metric for metric in result["metrics"] if metric["name"] == "output.rel_l2")
    assert (result["status"], metric["passed"], metric["source"]) == ("fail", False, "case")
    worst = f"worst row {metric['worst']['row']} ({metric['worst']['text']!r})"
    assert f"output.rel_l2 {metric['value']:.3g}, allowed 0 (case), {worst}" in done.stdout
    assert "Disproved: tiny-ort (fail)." in done.stdout


@pytest.mark.slow
def test_error_on_one_runtime_does_not_lose_the_result_of_another(first, store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", compiler="    sys.exit(255)")
    options = ("--sdk", prefix, "--store", store, "--report", tmp_path / "report")
    done = cli("run", config(tmp_path), "--runtimes", "ai100,ort", *options, cwd=tmp_path)
    assert done.returncode == 3
    statuses = {result["runtime"]: result["status"] for result in report_in(tmp_path / "report")["results"]}
    assert statuses == {"ai100": "error", "ort": "pass"}


# --- wrong usage and wrong configs: found before any work ----------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "tinny"), "--case: no case is called 'tinny'. Did you mean 'tiny'?"),
        (("--runtimes", "ort,smi"), "no runtime is called 'smi'. Did you mean 'sim'?"),
        (("--runtimes", ","), "--runtimes names no runtime"),
        (("--require", "ai10"), "--require: no runtime is called 'ai10'. Did you mean 'ai100'?"),
        (("--device-ids", "0,x"), "--device-ids: 'x' is no card id; give numbers such as 0,1"),
        (("--device-ids", "9" * 5000), "is no card id; give numbers such as 0,1"),
        (("--sdk", "n" * 300), "is no path: File name too long"),
        (("--report", "cases.yaml"), "cases.yaml is no folder; name a directory"),
        *(((f"--run-timeout={value}",), "--run-timeout") for value in ("0", "nan", "1h")),
        (("--run-timeout=inf",), "the time limit of a run is inf s"),
        (("--runtmes", "ort"), "No such option: --runtmes (Possible options: --run-timeout, --runtimes)"),
        (("nowhere.yaml",), "cannot read config nowhere.yaml: [Errno 2] No such file"),
    ],
)
def test_wrong_usage_exits_2_names_the_value_and_starts_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = cli("run", config(tmp_path).name, "--store", tmp_path / "store", *arguments, cwd=tmp_path)
    assert done.returncode == 2, said(done)
    assert message in said(done)
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.yaml"]


OUTPUTS = ["> /dev/full", "> /dev/full 2> /dev/full", "| true"]
"""Shell syntax of an output that cannot be written."""


@pytest.mark.parametrize("command", ["list cases.yaml", "list --help", "schema", "run cases.yaml --runtimes ai100"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_output_that_cannot_be_written_is_an_error_and_never_a_mismatch(
    command: str, output: str, tmp_path: Path
) -> None:
    config(tmp_path)
    text = f"({sys.executable} -m qeff_validate.cli {command}; echo $? > code) {output}"
    done = subprocess.run(["sh", "-c", text], cwd=tmp_path, env=environ(tmp_path), capture_output=True, check=False)
    assert (tmp_path / "code").read_text(encoding="utf-8").strip() == "3"
    assert b"Traceback" not in done.stderr
    assert b"cannot write to the standard output" in done.stderr or output.count(">") > 1


def test_closed_output_and_one_of_few_characters_change_no_exit_code(tmp_path: Path) -> None:
    command = f"{sys.executable} -m qeff_validate.cli run {config(tmp_path).name} --runtimes ai100"
    for text in (f"{command} >&-", f"{command} >&- 2>&- <&-", f"PYTHONIOENCODING=ascii {command}"):
        done = subprocess.run(["sh", "-c", text], cwd=tmp_path, env=environ(tmp_path), capture_output=True, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (3, False), done.stderr
        assert report_in(tmp_path / "qv-report")["results"][0]["status"] == "not_run"


@pytest.mark.parametrize("days", ["nan", "inf", "soon"])
def test_prune_wants_a_number_of_days(days: str, tmp_path: Path) -> None:
    done = cli("store", "prune", f"--days={days}", "--store", tmp_path / "store", cwd=tmp_path)
    assert done.returncode == 2, said(done)
    assert "--days" in said(done)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("run",), ("frobnicate",)])
def test_command_line_without_a_command_or_a_config_exits_2_without_a_traceback(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: qeff-validate" in said(done)
    assert "Traceback" not in done.stderr


BAD = {
    "unknown key": (
        "cases:\n" + case(extra="optoins: {pooling: max}"),
        "cases[0].optoins (case 'tiny'): unknown key. Did you mean 'options'?",
    ),
    "unknown key of a section": (
        "cases:\n" + case(extra="compile: {num_core: 4}"),
        "cases[0].compile.num_core (case 'tiny'): unknown key. Did you mean 'num_cores'?",
    ),
    "unknown default": (
        "defaults: {runtime: [ort]}\ncases:\n" + case(),
        "defaults.runtime: unknown key. Did you mean 'runtimes'?",
    ),
    "unknown pooling": (
        "cases:\n  - {name: x, source: 'random:bert', options: {pooling: medain}}\n",
        "case 'x': options: pooling: ",
        "'medain'",
        "'mean'",
    ),
    "unknown option": (
        "cases:\n  - {name: x, source: 'random:bert', options: {poolling: max}}\n",
        "poolling: unknown key. Did you mean 'pooling'?",
    ),
    "unknown runtime": ("cases:\n" + case(extra="runtimes: [ort, smi]"), "'smi'. Did you mean 'sim'?"),
    "unknown model kind": ("cases:\n" + case(extra="model: embeding"), "'embeding'. Did you mean 'embedding'?"),
    "unknown metric": (
        "cases:\n" + case(extra="tolerance: {ort: {rel_l3: 1e-3, why: because}}"),
        "'rel_l3'. Did you mean 'rel_l2'?",
    ),
    "NaN bound": (
        "cases:\n" + case(extra="tolerance: {ort: {rel_l2: .nan, why: because}}"),
        "ort.rel_l2: nan is no usable bound: give a number from 0",
    ),
    "negative bound": (
        "cases:\n" + case(extra="tolerance: {ort: {rel_l2: -0.1, why: because}}"),
        "ort.rel_l2: -0.1 is no usable bound",
    ),
    "bound without a reason": (
        "cases:\n" + case(extra="tolerance: {ort: {rel_l2: 0.1}}"),
        "ort: a bound needs its reason: add why:",
    ),
    "duplicate case name": ("cases:\n" + case() + case(), "case name 'tiny' is taken already"),
    "duplicate YAML key": ("cases:\n" + case(extra="seed: 1\nseed: 2"), "key 'seed' stands twice in one mapping"),
    "no YAML": ("cases: [\n", "is no YAML"),
    "no mapping": ("- name: x\n", "a config is a mapping with 'cases:', this is list"),
    "empty": ("", "a config is a mapping with 'cases:', this is NoneType"),
    "no case": ("cases: []\n", "cases: List should have at least 1 item"),
    "no source": ("cases:\n  - {name: x}\n", "cases[0].source (case 'x'): is missing"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_config_exits_2_names_place_value_and_remedy_and_starts_nothing(what: str, tmp_path: Path) -> None:
    text, *messages = BAD[what]
    (tmp_path / "bad.yaml").write_text(text)
    done = cli("run", "bad.yaml", "--store", tmp_path / "store", cwd=tmp_path)
    assert done.returncode == 2, said(done)
    assert [message for message in messages if message not in said(done)] == []
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml"]


# --- what is wrong with a source or an input: known when it is looked at ---------------------------------

WRONG = {
    "missing directory": ("path:no/such/dir", "", 2, ["{folder}/no/such/dir does not exist"]),
    "no model in the directory": ("path:.", "", 2, ["{folder} holds no config.json"]),
    "missing package": ("package:no_such_pkg/model", "", 3, ["'no_such_pkg' is not installed", "pip install"]),
    "unknown model type": ("random:brt", "", 2, ["random:brt: transformers knows no such model type"]),
    "two texts": ("random:bert", "inputs: {texts: [a, b, a]}", 2, ["at least 3 distinct texts are needed, got 2"]),
    "text longer than every bucket": (
        "random:bert",
        "inputs: {texts: [a, b, c d e f g h i j k]}\noptions: {seq_len: [4, 8]}",
        2,
        ["1 of 3 texts are longer than the greatest seq_len 8", "'c d e f g h i j k'", "at least 11", "truncate: true"],
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_source_or_input_is_an_error_with_the_remedy_and_leaves_nothing_half_made(
    what: str, tmp_path: Path
) -> None:
    source, extra, code, messages = WRONG[what]
    lines = "".join(f"    {line}\n" for line in extra.splitlines())
    path = config(tmp_path, f"  - name: x\n    source: {source}\n{lines}")
    done = cli("run", path, "--store", tmp_path / "store", "--runtimes", "ort", cwd=tmp_path)
    assert done.returncode == code, said(done)
    for message in messages:
        assert message.format(folder=tmp_path) in said(done)
    assert "Traceback" not in said(done)
    assert unfinished(tmp_path / "store") == []
    assert not list((tmp_path / "store").glob("*/*/provenance.json"))
    (result,) = report_in(tmp_path / "qv-report")["results"]
    assert (result["status"], result["metrics"]) == ("error", [])
    assert sorted(path.name for path in (tmp_path / "qv-report").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "results.jsonl",
    ]


@pytest.mark.slow
def test_report_that_cannot_be_written_is_an_error_before_anything_runs(first, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli("run", config(tmp_path), "--runtimes", "ort", "--report", "file/inside", cwd=tmp_path)
    assert done.returncode == 2
    assert "tiny" not in done.stdout
    assert "file is no folder; name a directory" in said(done)
    assert "Traceback" not in done.stderr


# --- compilers that misbehave ----------------------------------------------------------------------


def checked_error(done, store: Path, folder: Path) -> str:
    """The reason of the one result, after the checks that hold for every compiler that fails."""
    assert done.returncode == 3, said(done)
    assert unfinished(store) == []
    assert not list((store / "qpc").glob("*"))
    (result,) = report_in(folder / "report")["results"]
    assert (result["status"], result["stage"], result["metrics"]) == ("error", "compile", [])
    return result["reason"]


@pytest.mark.slow
def test_compiler_that_exits_255_is_an_error_with_its_last_words_and_the_command(store: Path, tmp_path: Path) -> None:
    body = """
    print("Reading the model")
    print("QAIC_ERROR: this operator is unknown", file=sys.stderr)
    sys.exit(255)
    """
    prefix = sdk_prefix.prefix(tmp_path / "sdk", compiler=body)
    reason = checked_error(finish(run_on(prefix, store, tmp_path)), store, tmp_path)
    assert "the compiler failed with exit code 255: QAIC_ERROR: this operator is unknown" in reason
    assert f"command: {prefix}/exec/qaic-compile -aic-hw -aic-hw-version=ai100" in reason
    assert "| Reading the model" in reason


@pytest.mark.slow
def test_compiler_that_says_success_without_a_program_is_an_error(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", compiler="    print('done')")
    reason = checked_error(finish(run_on(prefix, store, tmp_path)), store, tmp_path)
    assert "the compiler said success but wrote no programqpc.bin" in reason


@pytest.mark.slow
def test_compiler_that_cannot_be_started_is_an_error(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk")
    (prefix / "exec" / "qaic-compile").write_text("#!/no/such/interpreter\n")
    reason = checked_error(finish(run_on(prefix, store, tmp_path)), store, tmp_path)
    assert f"cannot start the compiler {prefix}/exec/qaic-compile: No such file or directory" in reason


def family(prefix: Path) -> list[int]:
    """The pids of a compiler and its child, once both run."""
    pids = sdk_prefix.ran(prefix)["pids"]
    return pids if len(pids) == 2 else []


FAMILY = """
    child = subprocess.Popen(["sleep", "600"])
    record([os.getpid(), child.pid])
    print("I take my time", flush=True)
    signal.pause()
"""


@pytest.mark.slow
def test_compiler_that_hangs_is_killed_at_the_time_limit_with_its_children(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", compiler=FAMILY)
    done = finish(run_on(prefix, store, tmp_path, "compile: {timeout_s: 2}"))
    reason = checked_error(done, store, tmp_path)
    assert "the compiler did not finish within 2 s and was killed; raise compile.timeout_s" in reason
    assert "| I take my time" in reason
    pids = sdk_prefix.ran(prefix)["pids"]
    try:
        assert len(pids) == 2
        until(lambda: not any(map(alive, pids)), "compiler and its child are dead")
    finally:
        kill_leftovers(pids)


# --- interruptions ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("step", ["module", "export"])
def test_ctrl_c_during_export_exits_130_and_leaves_no_half_made_artifact(step: str, first, tmp_path: Path) -> None:
    store, report = copied_store(tmp_path), tmp_path / "report"
    shutil.rmtree(store / "onnx")
    log = tmp_path / "stderr"
    options = ("--runtimes", "ort", "--store", store, "--report", report, "--verbose")
    process = start("run", config(tmp_path), *options, cwd=tmp_path, stderr=log)
    with ended(process):
        until(lambda: unfinished(store), "the stage has begun")
        until(lambda: f"tiny: {step}: running" in log.read_text(), "the step runs")
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done.returncode == 130, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last == "qeff-validate: interrupted; finished artifacts are in the store, nothing is half-written"
    assert "Traceback" not in log.read_text()
    assert unfinished(store) == []
    assert not (store / "onnx").exists()
    assert not report.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_while_the_compiler_runs_kills_it_with_its_children_and_cleans_up(
    sent: signal.Signals, code: int, store: Path, tmp_path: Path
) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", compiler=FAMILY)
    process = run_on(prefix, store, tmp_path)
    pids: list[int] = []
    try:
        with ended(process):
            pids = until(lambda: family(prefix), "the compiler and its child run")
            process.send_signal(sent)
            done = finish(process)
        assert done.returncode == code, said(done)
        until(lambda: not any(map(alive, pids)), "compiler and its child are dead")
    finally:
        kill_leftovers(pids)
    assert unfinished(store) == []
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_sigkill_takes_the_compiler_along_and_the_next_run_recovers(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", compiler="    signal.pause()")
    process = run_on(prefix, store, tmp_path)
    pids: list[int] = []
    try:
        with ended(process):
            pids = until(lambda: sdk_prefix.ran(prefix)["pids"], "the compiler runs")
            assert alive(pids[0])
            process.kill()
            process.communicate()
        until(lambda: not alive(pids[0]), "the compiler died with us")
    finally:
        kill_leftovers(pids)
    assert unfinished(store) != [], "a process that was killed cannot have cleaned up"
    sdk_prefix.set_compiler(prefix, sdk_prefix.COMPILES)
    done = finish(run_on(prefix, store, tmp_path, "", "--require", "ai100"))
    assert done.returncode == 0, said(done)
    assert unfinished(store) == []
    assert report_in(tmp_path / "report")["results"][0]["status"] == "pass"


def test_finished_run_leaves_only_whole_entries_whose_key_is_on_record(first) -> None:
    store = Path(os.environ["QEFF_VALIDATE_HOME"])
    entries = [entry for kind in ("inputs", "reference", "floor", "onnx", "qpc") for entry in (store / kind).iterdir()]
    assert len(entries) >= 5
    for entry in entries:
        provenance = json.loads((entry / "provenance.json").read_text())
        assert {"kind", "key", "files", "seconds"} <= set(provenance)
        assert provenance["kind"] == entry.parent.name


# --- output ----------------------------------------------------------------------------------------


def test_version_json_quiet_selection_and_fail_fast(first, store: Path, tmp_path: Path) -> None:
    assert cli("--version", cwd=tmp_path).stdout.startswith("qeff-validate ")
    path = config(tmp_path, f"{case()}{case().replace('tiny', 'second').replace('random:bert', 'path:/nowhere')}")
    options = ("--store", store, "--report", tmp_path / "report", "--runtimes", "torch,ort")
    lines = cli("run", path, "-k", "tin", "--json", *options, cwd=tmp_path).stdout.splitlines()
    assert [json.loads(line)["runtime"] for line in lines] == ["torch", "ort"]
    quiet = cli("run", path, "-k", "t*y", "--quiet", *options, cwd=tmp_path)
    assert quiet.stderr == ""
    assert "nearest bound" not in quiet.stdout
    assert "Proved: ort" in quiet.stdout
    stopped = cli("run", path, "--case", "second", "--fail-fast", *options, cwd=tmp_path)
    statuses = [result["status"] for result in report_in(tmp_path / "report")["results"]]
    assert (stopped.returncode, statuses) == (2, ["error", "not_run"])
    assert "second-torch did not pass, and --fail-fast is on" in stopped.stdout
    assert "fits none of the cases tiny, second" in cli("run", path, "-k", "x", *options, cwd=tmp_path).stderr


def test_problem_of_all_runtimes_is_told_once(tmp_path: Path) -> None:
    options = ("--store", tmp_path / "store", "--report", tmp_path / "report", "--runtimes", "torch,ort,sim")
    done = cli("run", "--model", "path:/nowhere", *options, cwd=tmp_path)
    assert done.stdout.count("directory /nowhere does not exist") == 1
    assert "nowhere-torch, nowhere-ort, nowhere-sim: error at config" in done.stdout


def test_init_writes_files_that_run_and_overwrites_nothing(tmp_path: Path) -> None:
    done = cli("init", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".github/workflows/validate.yml").is_file()
    assert "tiny" not in cli("list", "validation.yaml", cwd=tmp_path).stdout
    store = ("--store", tmp_path / "store", "--runtimes", "torch")
    run = cli("run", "validation.yaml", *store, cwd=tmp_path)
    assert (run.returncode, "Proved: torch" in run.stdout) == (0, True), run.stdout + run.stderr
    before = (tmp_path / "validation.yaml").read_text()
    again = cli("init", "--yes", "--source", "random:gpt2", cwd=tmp_path)
    assert (again.returncode, "is here already" in again.stderr) == (2, True)
    assert (tmp_path / "validation.yaml").read_text() == before


@pytest.mark.parametrize(
    "first", ["from qeff_validate.cli import main; main(['--version'])", "import qeff_validate.suites"]
)
def test_threads_of_torch_do_not_spin_while_they_wait(first: str, tmp_path: Path) -> None:
    """What its OpenMP library says when it is loaded; waiting threads that spin take the processors of busy ones."""
    variables = {key: value for key, value in environ(tmp_path).items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{first}; import torch"],
        env={**variables, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GOMP_SPINCOUNT = '0'" in done.stderr


def test_init_quickstart_writes_the_quickstart_of_the_repository(tmp_path: Path) -> None:
    done = cli("init", "--quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = (HERE.parents[2] / "configs" / "quickstart.yaml").read_text(encoding="utf-8").partition("\n")[2]
    head = "# yaml-language-server: $schema=validation.schema.json\n"
    assert (tmp_path / "validation.yaml").read_text(encoding="utf-8") == head + kept
    schema = HERE.parents[2] / "configs" / "schema.json"
    assert (tmp_path / "validation.schema.json").read_bytes() == schema.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    refused = cli("init", "--quickstart", "--source", "random:bert", cwd=other)
    assert (refused.returncode, [*other.iterdir()]) == (2, [])
