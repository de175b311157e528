# SPDX-License-Identifier: Apache-2.0
"""Packages of outsiders, installed into an environment of their own: a runtime, the least model kind, and a full one.

None changes a line of ours. The environment sees this one's packages; only the plug-ins are installed into it.
"""

from __future__ import annotations

import csv
import json
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLUGINS = ("openvino_runtime", "projection_kind", "scorer_kind")
CONFIG = """
defaults: {runtimes: [ort, openvino, openvino_fp16]}
cases:
  - name: score
    model: scorer
    source: random:scorer
    runtimes: [torch, ort, sim, openvino, openvino_fp16]
    tolerance:
      ort: {margin: 1.0e-5, why: one kernel}
  - {name: projected, model: projection, source: 'random:projection', runtimes: [torch, ort, sim]}
  - {name: bert, source: 'random:bert', tolerance: table}
  - name: llama
    model: peft-causal-lm
    source: random:llama
    tolerance: table
    options: {peft_method: lora, peft: {r: 4}, max_new_tokens: 4}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the plug-ins."""
    folder = tmp_path_factory.mktemp("plugins")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    made = folder / "env" / "bin" / "python"
    (packages,) = folder.glob("env/lib/python*/site-packages")
    (packages / "host.pth").write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n")
    sources = [str(shutil.copytree(HERE / name, folder / name)) for name in PLUGINS]  # setuptools builds in place
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "--python", str(made), "install", *options]
    subprocess.run([*pip, *sources], check=True)
    return made


def run(python: Path, folder: Path, *command: str, code: int = 0) -> str:
    """What a module prints when it is run in a folder; its exit code must be as wanted."""
    folder.mkdir(exist_ok=True)
    child = subprocess.run(
        [str(python), "-m", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == code, child.stdout[-4000:]
    return child.stdout


def config(folder: Path, text: str = CONFIG) -> str:
    (folder / "case.yaml").write_text(text)
    return "case.yaml"


def test_suites_collect_and_pass_plugins_with_their_marks_relations_and_report(python: Path, tmp_path: Path) -> None:
    suites = ["pytest", "-q", "--qv-config", config(tmp_path), "--qv-report", "report"]
    selected = ["-m", "openvino or openvino_fp16 or scorer or projection", "--pyargs", "qeff_validate.suites"]
    run(python, tmp_path, *suites, *selected)
    results = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    verdicts = [r for r in results if r["reference"] != "itself" and r["runtime"] != "ai100"]
    compared = {(r["case"], r["runtime"]): r for r in verdicts}
    assert {key: r["status"] for key, r in compared.items()} == {
        (case, name): "pass"
        for case, names in {
            "score": ("torch", "ort", "sim", "openvino", "openvino_fp16"),
            "projected": ("torch", "ort", "sim"),
            "bert": ("openvino", "openvino_fp16"),
            "llama": ("openvino", "openvino_fp16"),
        }.items()
        for name in names
    }
    assert {key: r["precision"] for key, r in compared.items() if "openvino" in key[1]} == {
        (case, name): precision
        for case in ("score", "bert", "llama")
        for name, precision in (("openvino", "fp32"), ("openvino_fp16", "fp16"))
    }, "capabilities decide the bounds, not the kind of artifact"
    related = {(r["case"], r["runtime"], r["stage"]) for r in results if r["reference"] == "itself"}
    assert ("score", "openvino_fp16", "opposite_order") in related
    margins = [m for r in results if r["case"] == "score" for m in r["metrics"] if m["name"] == "margin"]
    assert {(m["bound"], m["source"]) for m in margins} == {(1e-4, "fallback"), (2e-2, "fallback"), (1e-5, "case")}
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == [result["status"] for result in results]


def test_bound_of_a_plugins_own_metric_is_a_gate(python: Path, tmp_path: Path) -> None:
    tight = CONFIG.replace("1.0e-5", "1.0e-12")
    command = ["qeff_validate.cli", "run", config(tmp_path, tight), "--case", "score", "--runtimes", "ort", "--report"]
    said = run(python, tmp_path, *command, "r", code=1)
    assert "margin" in said
    assert "allowed 1e-12 (case)" in said
    config(tmp_path, CONFIG.replace("margin:", "margins:"))
    assert "Did you mean 'margin'?" in run(python, tmp_path, *command, "r", code=2)


def test_list_and_doctor_show_plugins(python: Path, tmp_path: Path) -> None:
    assert "scorer" in run(python, tmp_path, "qeff_validate.cli", "list", config(tmp_path))
    assert "openvino_fp16   usable" in run(python, tmp_path, "qeff_validate.cli", "doctor")


def test_least_model_kind_is_short() -> None:
    source = (HERE / "projection_kind" / "projection_kind.py").read_text()
    assert len(source.splitlines()) <= 60


def test_mutants_of_a_plugin_are_those_it_declares(python: Path, tmp_path: Path) -> None:
    code = "from qeff_validate.mutation.mutant import mutants; print([m.name for m in mutants('scorer')])"
    found = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "['last layer negated']\n"


def test_runtime_of_a_plugin_passes_the_contract(python: Path, tmp_path: Path) -> None:
    """But for one sentence of it: what reads all of its inputs in float16 hands state out rounded."""
    chosen = "openvino and not scorer and not projection and not (openvino_fp16 and fed_state_becomes_the_state)"
    options = ["-n", "0", "-p", "no:cacheprovider", "--rootdir", str(HERE.parents[1]), "-k", chosen]
    said = run(python, tmp_path, "pytest", "-q", *options, str(HERE.parent / "contract" / "test_runtimes.py"))
    assert "passed" in said
    assert "failed" not in said
