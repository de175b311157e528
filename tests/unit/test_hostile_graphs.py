# SPDX-License-Identifier: Apache-2.0
"""ONNX files that never come to an end: every runtime is ended at the time limit, by signals, and leaves no child."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_graphs
import numpy as np
import onnx
import pytest
from processes import SMALL_BERT, alive, ended, kill_leftovers, start, until

from qeff_validate.artifact import Artifact
from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, load, validate
from qeff_validate.protocols import Settings
from qeff_validate.sdk.simulated.compiler.function_inlining import MOST_NODES, too_large

pytestmark = pytest.mark.integration


def config(folder: Path, graph: Path, runtimes: str) -> Path:
    path = folder / "c.yaml"
    extra = f"    tolerance: table\n    runtimes: {runtimes}\n    artifacts: {{onnx: {graph.name}}}\n"
    path.write_text(f"cases:\n  - name: tiny\n{SMALL_BERT}{extra}    compile: {{timeout_s: 60}}\n", encoding="utf-8")
    return path


def case_of(folder: Path, graph: Path, runtimes: str) -> Case:
    return load([config(folder, graph, runtimes)])[0]


@pytest.mark.parametrize("runtime", ["ort", "sim"])
def test_loop_without_end_is_ended_at_the_time_limit(runtime: str, tmp_path: Path) -> None:
    case = case_of(tmp_path, hostile_graphs.endless_loop(tmp_path / "m.onnx"), f"[{runtime}]")
    report = validate(case, store=tmp_path / "s", settings=Settings(run_timeout_s=1))
    (result,) = report.results
    assert result.status == "error"
    assert f"{runtime} did not answer for 1 s in run 1" in (result.reason or "")


@pytest.mark.parametrize("runtime", ["ort", "sim"])
@pytest.mark.parametrize("make", hostile_graphs.BOMBS)
def test_functions_without_end_are_refused_before_anything_opens_them(
    make: Callable[[Path], Path], runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    case = case_of(tmp_path, make(tmp_path / "m.onnx"), f"[{runtime}]")
    (result,) = validate(case, store=tmp_path / "s").results
    words = "calls itself" if make in (hostile_graphs.recursive, hostile_graphs.circular) else "with its functions"
    assert result.status == "error"
    assert words in (result.reason or "")


@pytest.mark.parametrize("runtime", ["ort", "sim"])
@pytest.mark.parametrize("make", [hostile_graphs.cycle, hostile_graphs.without_ends])
def test_file_that_is_no_graph_is_an_error_with_a_reason(
    make: Callable[[Path], Path], runtime: str, tmp_path: Path
) -> None:
    case = case_of(tmp_path, make(tmp_path / "m.onnx"), f"[{runtime}]")
    (result,) = validate(case, store=tmp_path / "s", settings=Settings(run_timeout_s=60)).results
    assert result.status == "error"
    assert "unexpected" not in (result.reason or "")


def test_compiler_of_the_simulated_sdk_refuses_bombs_by_itself(tmp_path: Path) -> None:
    from qeff_validate.sdk.simulated.compiler import qaic_compile

    for make in hostile_graphs.BOMBS:
        path = make(tmp_path / f"{make.__name__}.onnx")
        assert qaic_compile.main([f"-m={path}", "-aic-hw", f"-aic-binary-dir={tmp_path / make.__name__}"]) == 255


@pytest.mark.parametrize(("depth", "fits"), [(2, True), (20, True), (22, False)])
def test_nodes_are_counted_as_the_inliner_makes_them(depth: int, fits: bool, tmp_path: Path) -> None:
    model = onnx.load(str(hostile_graphs.doubling(tmp_path / "m.onnx", depth)))
    assert (too_large(model) == "") is fits
    if depth == 2:
        inlined = onnx.inliner.inline_local_functions(model)
        assert sum(node.op_type == "Neg" for node in inlined.graph.node) == 2


def test_chain_of_functions_beyond_the_stack_is_counted(tmp_path: Path) -> None:
    calls = {f"f{n}": [f"f{n - 1}"] if n else [] for n in range(20_000)}
    model = onnx.load(str(hostile_graphs._calling(tmp_path / "m.onnx", calls, "f19999")))
    assert too_large(model) == ""
    assert MOST_NODES >= 10**6


def test_answers_of_a_graph_in_a_process_of_its_own_are_those_of_one_in_ours(tmp_path: Path) -> None:
    path = hostile_graphs.doubling(tmp_path / "m.onnx", 3)
    feeds: dict[str, Any] = {"input_ids": np.arange(6).reshape(2, 3), "attention_mask": np.ones((2, 3), np.int64)}
    runtime, found = Runner(store=tmp_path / "s").runtime("ort"), []
    for untrusted in (False, True):
        with runtime.open(Artifact("onnx", path, "0", untrusted=untrusted)) as session:
            assert hasattr(session, "_child") is untrusted
            found.append(session.run(feeds)["output"])
    np.testing.assert_array_equal(*found)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def busy(pid: int) -> bool:
    """Whether a process has computed for as long as only a loop does."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) > 3 * os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_inside_a_loop_without_end_ends_the_run_and_its_child(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    path = config(tmp_path, hostile_graphs.endless_loop(tmp_path / "m.onnx"), "[ort]")
    process = start("run", path, "--store", "s", "--report", "r", cwd=tmp_path)
    with ended(process):
        (child,) = until(lambda: children(process.pid), "the child starts")
        until(lambda: busy(child), "the loop runs")
        try:
            sent = time.monotonic()
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
            assert time.monotonic() - sent < 10
            assert process.returncode == code
            assert "Traceback" not in (err or "")
            assert not alive(child)
        finally:
            kill_leftovers([child])
