# SPDX-License-Identifier: Apache-2.0
"""Optimization levels of ONNX Runtime: from settings, from the environment, and in reports."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from bounds import close
from onnx import TensorProto, helper, save
from simulated_graphs import graph

from qeff_validate.artifact import Artifact
from qeff_validate.engine import environment
from qeff_validate.errors import ConfigError
from qeff_validate.protocols import Settings
from qeff_validate.runtimes.ort import LEVELS, OPTIMIZATION, OrtRuntime, session_options


@pytest.mark.parametrize("level", LEVELS)
def test_settings_win_over_the_environment_which_wins_over_the_default(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = getattr(ort.GraphOptimizationLevel, LEVELS[level])
    monkeypatch.delenv(OPTIMIZATION, raising=False)
    assert session_options().graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert session_options(Settings(ort_optimization=level)).graph_optimization_level == wanted
    monkeypatch.setenv(OPTIMIZATION, level)
    assert session_options().graph_optimization_level == wanted
    monkeypatch.setenv(OPTIMIZATION, "nothing")
    assert session_options(Settings(ort_optimization=level)).graph_optimization_level == wanted


@pytest.mark.parametrize("there", ["settings", "environment"])
def test_an_unknown_level_is_a_config_error(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph([helper.make_node("Neg", ["x"], ["y"])], {"x": (TensorProto.FLOAT, [2])}, {"y": (1, [2])})
    save(model, tmp_path / "m.onnx")
    if there == "environment":
        monkeypatch.setenv(OPTIMIZATION, "extendet")
    settings = Settings(ort_optimization="extendet" if there == "settings" else None)
    with (
        pytest.raises(ConfigError, match=rf"'extendet' .*{OPTIMIZATION}.*Did you mean 'extended'"),
        OrtRuntime(settings).open(Artifact("onnx", tmp_path / "m.onnx", "0" * 64)),
    ):
        pass


def test_a_report_says_what_kernels_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv(OPTIMIZATION, "basic")
    kernels = environment(Settings(ort_optimization="disabled"))["host"]["kernels"]
    assert kernels["ATEN_CPU_CAPABILITY"] == "avx2"
    assert kernels[OPTIMIZATION] == "basic"
    assert kernels["ort_optimization"] == "disabled"
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert "ATEN_CPU_CAPABILITY" not in environment(Settings())["host"]["kernels"]


@pytest.mark.parametrize(("packed", "arena"), [(None, True), (True, True), (False, False)])
def test_session_that_saves_memory_has_no_arena(packed: bool | None, arena: bool) -> None:
    assert session_options(Settings(packed_weights=packed)).enable_cpu_mem_arena is arena


@pytest.mark.numeric
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("packed", [None, True, False])
def test_large_weights_are_read_from_their_file_unless_they_are_asked_for_in_memory(
    size: str, packed: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, [2, 64])}, {"y": (1, [2, 64])}, w=weights)
    save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    monkeypatch.setattr("qeff_validate.runtimes.ort.MOST_PACKED", 1 << 30 if size == "small" else 64 * 64 * 4)
    x = np.ones((2, 64), np.float32)
    with OrtRuntime(Settings(packed_weights=packed)).open(Artifact("onnx", tmp_path / "m.onnx", "0" * 64)) as session:
        close(session.run({"x": x})["y"], x @ weights, rtol=1e-5, atol=1e-4)
        options = session._session.get_session_options()
    in_memory = size == "small" if packed is None else packed
    with nullcontext() if not in_memory else pytest.raises(RuntimeError, match="disable_prepacking"):
        assert options.get_session_config_entry("session.disable_prepacking") == "1"
