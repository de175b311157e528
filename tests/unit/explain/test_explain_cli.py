# SPDX-License-Identifier: Apache-2.0
"""A user's graph with one wrong weight, from the command line to its last line."""

from __future__ import annotations

import json
import subprocess
import sys
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


BLOCKED = """\
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "qeff_validate", "safetensors"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def reproduced(folder: Path, *options: str | Path) -> tuple[int, str]:
    """Run the script of a bundle where numpy and onnxruntime alone can be imported."""
    command = [sys.executable, "-c", BLOCKED, str(folder / "repro.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout + done.stderr


def test_bundle_shows_the_error_alone_until_it_is_mended(damaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    command = ("explain", damaged, "--case", "tiny", "--runtime", "ort", "--repro", folder)
    done = cli(*command, cwd=damaged.parent)
    assert done.returncode == 0, said(done)
    assert done.stdout.splitlines()[-1].startswith(f"repro bundle: {folder} (")
    assert sorted(path.name for path in folder.iterdir()) == [
        "ISSUE.md", "data.npz", "model.onnx", "repro.json", "repro.py",
    ]  # fmt: skip
    about = json.loads((folder / "repro.json").read_text())
    assert (about["rows"], about["nodes"], about["stage"]) == (1, 2, "export")
    texts = [len(text.split()) for text in ("a b c", "d e", "the man")]
    assert about["length"] <= min(texts) + 2  # the shortest text, with the tokens around it

    code, text = reproduced(folder)
    assert code == 1, text
    assert "weight row 7 is zero" in text
    assert text.endswith("the error shows\n")
    issue = (folder / "ISSUE.md").read_text()
    assert text.splitlines()[-2] in issue
    assert f"onnxruntime=={about['versions']['onnxruntime']}" in issue

    model = onnx.load(str(folder / "model.onnx"))
    (weight,) = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [32, 37]]
    _, report = first_run(tmp_path.parent / "first-run")
    healthy = onnx.load(next(item["artifact"]["path"] for item in report["results"] if item["runtime"] == "ort"))
    weight.CopyFrom(next(tensor for tensor in healthy.graph.initializer if list(tensor.dims) == [32, 37]))
    onnx.save(model, str(tmp_path / "mended.onnx"))
    code, text = reproduced(folder, "--model", tmp_path / "mended.onnx")
    assert (code, text.splitlines()[-1]) == (0, "the error is gone")

    (folder / "data.npz").write_bytes(b"")
    code, text = reproduced(folder)
    assert code == 3, text

    done = cli(*command, cwd=damaged.parent)
    assert done.returncode == 2
    assert "exists already" in said(done)


def test_no_bundle_of_a_case_without_an_error(damaged: Path, tmp_path: Path) -> None:
    healthy = config(tmp_path, case())
    done = cli("explain", healthy, "--case", "tiny", "--runtime", "ort", "--repro", "bundle", cwd=tmp_path)
    assert done.returncode == 3, said(done)
    assert "no repro bundle was written: no part of the graph shows the error" in said(done)
    assert [path.name for path in tmp_path.iterdir()] == ["cases.yaml"]
