# SPDX-License-Identifier: Apache-2.0
"""Build here, judge there: whole, verified, and without torch, transformers or a compiler."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import cli

pytestmark = pytest.mark.integration

CONFIG = """
cases:
  - name: bert
    source: random:bert
    options: {seq_len: [48, 64], pooling: max}
    precision: {weights: mxfp6}
    exporter: torchscript
  - name: lora
    model: peft-causal-lm
    source: random:llama
    options:
      {peft_method: lora, peft: {r: 4, init: 0.1}, prefill_seq_len: 4, ctx_len: 16, max_new_tokens: 3,
       prompts: [a, b c]}
"""

JUDGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "onnxscript", "peft"}:
            raise ImportError(f"{name} is not on this host")
sys.meta_path.insert(0, Refuse())
import qeff_validate.builders.compile_qpc as compile
def no_compiler(*a, **k): raise AssertionError("compiled")
compile.run_compiler = no_compiler
from qeff_validate.cli import main
sys.exit(main(sys.argv[1:]))
"""


def judge(bundle: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    places = ["--store", str(tmp_path / "empty"), "--report", str(tmp_path / "report")]
    command = [sys.executable, "-c", JUDGE, "run", "--bundle", str(bundle), *places]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "c.yaml").write_text(CONFIG)
    done = cli("build", folder / "c.yaml", "--bundle", folder / "made", "--runtime", "sim", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "made"], "nothing else is left"
    return folder / "made"


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copied"))


def test_another_host_needs_no_framework_and_no_compiler(copied: Path, tmp_path: Path) -> None:
    done = judge(copied, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    assert [result["case"] for result in results] == ["bert", "lora"]
    for result in results:
        assert (result["status"], result["reference"], result["simulated"]) == ("pass", "recorded", True)
        assert result["coverage"]["compared"] >= 24
    assert not (tmp_path / "empty").exists(), "nothing had to be built"


@pytest.mark.parametrize("file", ["bert/qpc/programqpc.bin", "bert/reference.safetensors"])
@pytest.mark.parametrize("change", ["one bit", "missing", "cut"])
def test_a_changed_file_is_named_and_nothing_is_judged(copied: Path, tmp_path: Path, file: str, change: str) -> None:
    path = copied / file
    data = bytearray(path.read_bytes())
    if change == "missing":
        path.unlink()
    elif change == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    done = judge(copied, tmp_path)
    assert done.returncode == 3
    assert f"{file} changed, missing or added" in done.stderr
    assert not (tmp_path / "report").exists()


def test_an_added_file_is_named(copied: Path, tmp_path: Path) -> None:
    (copied / "bert" / "more").write_text("")
    assert "bert/more changed, missing or added" in judge(copied, tmp_path).stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "is no bundle"), ("{", "is no bundle"), ('{"schema": 1}', "build it anew"), ("other", "schema 99")],
)
def test_what_is_no_bundle_is_a_config_error(copied: Path, tmp_path: Path, text: str | None, words: str) -> None:
    manifest = copied / "bundle.json"
    if text is None:
        manifest.unlink()
    else:
        whole = {**json.loads(manifest.read_text()), "schema": 99}
        manifest.write_text(json.dumps(whole) if text == "other" else text)
    done = judge(copied, tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


def test_building_over_something_or_for_another_runtime_is_refused(built: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = cli("build", tmp_path / "c.yaml", "--bundle", built, "--runtime", "sim", cwd=tmp_path)
    assert (done.returncode, "exists already" in done.stderr) == (2, True)
    done = cli("build", tmp_path / "c.yaml", "--bundle", tmp_path / "new", "--runtime", "ort", cwd=tmp_path)
    assert (done.returncode, "a bundle holds QPCs" in done.stderr) == (2, True)
    done = cli("build", tmp_path / "c.yaml", "--bundle", tmp_path / "new", "--runtime", "ai100", cwd=tmp_path)
    assert done.returncode == 3
    assert "no AI 100 compiler" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]
