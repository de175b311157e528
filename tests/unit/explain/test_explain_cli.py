# SPDX-License-Identifier: Apache-2.0
"""A user's graph with one wrong weight, from the command line to its last line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from processes import case, cli, config, first_run, forked_pytest, report_in, said

pytestmark = pytest.mark.integration

MODULE = "encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose graph has a zero row in one weight, and no metadata that would tell a precheck."""
    _, report = first_run(tmp_path_factory.getbasetemp() / "first-run")
    artifact = next(result["artifact"] for result in report["results"] if result["runtime"] == "ort")
    folder = tmp_path_factory.mktemp("damaged")
    model = onnx.load(artifact["path"])
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [32, 37])
    values = numpy_helper.to_array(weight).copy()
    values[:, 7] = 0
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), weight.name))
    del model.metadata_props[:]
    onnx.save(model, str(folder / "model.onnx"))
    return config(folder, case(extra=f"artifacts: {{onnx: {folder / 'model.onnx'}}}"))


def test_last_line_of_a_run_names_the_layer_and_what_differs_there(damaged: Path) -> None:
    done = cli("run", damaged, "--runtimes", "ort", cwd=damaged.parent)
    assert done.returncode == 1, said(done)
    assert done.stdout.splitlines()[-1] == f"tiny-ort: layer {MODULE}, weight row 7 is zero (export)"
    (result,) = report_in(damaged.parent / "qv-report")["results"]
    explanation = result["explanation"]
    assert (explanation["stage"], explanation["module"]) == ("export", MODULE)
    assert sum(stage["share"] for stage in explanation["stages"]) == pytest.approx(1)


def test_command_explain_prints_the_explanation_of_a_compiled_program_as_json(damaged: Path) -> None:
    done = cli("explain", damaged, "--case", "tiny", "--runtime", "sim", "--json", cwd=damaged.parent)
    assert done.returncode == 0, said(done)
    explanation = json.loads(done.stdout)
    assert [stage["name"] for stage in explanation["stages"]][-2:] == ["precision", "compiler and runtime"]
    assert (explanation["module"], explanation["finding"]) == (MODULE, "weight row 7 is zero")


def test_pytest_names_the_layer_in_the_failure_and_can_be_told_not_to(damaged: Path, pytester: pytest.Pytester) -> None:
    options = ("-p", "no:cacheprovider", "--qv-config", str(damaged), "--qv-runtimes", "ort")
    suites = ("--pyargs", "qeff_validate.suites.test_embedding")
    result = forked_pytest(pytester, *options, *suites, timeout=240)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"where: layer {MODULE}, weight row 7 is zero (export)"])
    result = forked_pytest(pytester, *options, "--qv-explain", "off", *suites, timeout=240)
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*weight row 7 is zero*")
