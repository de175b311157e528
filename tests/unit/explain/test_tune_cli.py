# SPDX-License-Identifier: Apache-2.0
"""A model that overflows in fp16 is mended from the command line; and the exit codes of what is not mended."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import yaml
from safetensors.torch import load_file, save_file
from small_models import save_model, save_tokenizer

from qeff_validate.cli.app import run_command
from qeff_validate.comparison.bounds import FALLBACK
from qeff_validate.engine import Runner, load
from qeff_validate.explain.float32_nodes import Search
from qeff_validate.pipeline.tuning import Tuning
from qeff_validate.report.result import Result

CASE = """\
cases:
  - name: big
    source: path:model
    inputs: {texts: ["red green", "blue one two", "three ."]}
    options: {pooling: mean, seq_len: [16], batch_size: 2}
    exporter: torchscript
"""


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A config whose BERT is the same in float32 as before, with one neuron of its feed-forward beyond 65,504."""
    model = save_model(tmp_path / "model", "AutoModel", hidden_act="relu")
    save_tokenizer(model)
    weights = load_file(model / "model.safetensors")
    for name in ("intermediate.dense.weight", "intermediate.dense.bias"):
        weights[f"encoder.layer.0.{name}"][3] *= 1e6
    weights["encoder.layer.0.output.dense.weight"][:, 3] /= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "cases.yaml").write_text(CASE, encoding="utf-8")
    return tmp_path / "cases.yaml"


@pytest.mark.integration
def test_model_that_overflows_passes_with_the_nodes_of_one_neuron_in_float32(
    overflowing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = overflowing.parent
    monkeypatch.chdir(folder)
    command = ["tune", str(overflowing), "--case", "big", "--store", str(folder / "store"), "--json"]
    assert run_command(command) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert (tuned["before"]["status"], tuned["after"]["status"]) == ("fail", "pass")
    # the bounds are measured, with what overflows in float32, and are narrower than the table's
    assert (tuned["beyond_range"], tuned["by_table"]) == (True, False)
    bounds = {item["name"]: item["bound"] for item in tuned["after"]["metrics"]}
    assert bounds["output.rel_l2"] < FALLBACK["fp16"]["rel_l2"]
    assert tuned["smallest"]
    assert 1 <= len(tuned["nodes"]) <= 5
    assert all("/encoder/layer.0/" in name for name in tuned["nodes"])
    file = folder / "node-precision.yaml"
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {"FP32NodeInstanceNames": tuned["nodes"]}
    assert run_command(command) == 2
    assert "node-precision.yaml exists already" in capsys.readouterr().err

    # what is to be added to the case makes it pass, wherever the command is run
    added = "    compile: {flags: {node-precision-info: node-precision.yaml}}\n"
    added += "    precision: {beyond_range: float32}\n"
    overflowing.write_text(CASE + added, encoding="utf-8")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run_command(command[:-1]) == 0
    assert "the case passes without further nodes in float32" in capsys.readouterr().out
    assert not list(elsewhere.iterdir())


LANGUAGE_MODEL = """\
cases:
  - name: big
    model: peft-causal-lm
    source: path:model
    options: {peft_method: lora, peft: {init: 0.1, r: 4, target_modules: [q_proj]}, max_new_tokens: 3,
      prefill_seq_len: 4, ctx_len: 16}
    inputs: {texts: ["red green blue one", "three . two"]}
"""


@pytest.mark.integration
def test_language_model_that_overflows_passes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_act": "relu", "num_key_value_heads": 2, "eos_token_id": 3, "bos_token_id": 2}
    model = save_model(tmp_path / "model", "AutoModelForCausalLM", model_type="llama", **sizes)
    save_tokenizer(model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3] *= 1e6
    weights["model.layers.0.mlp.down_proj.weight"][:, 3] /= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "cases.yaml").write_text(LANGUAGE_MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_command(["tune", "cases.yaml", "--case", "big", "--store", "store", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert (tuned["before"]["status"], tuned["after"]["status"], tuned["beyond_range"]) == ("fail", "pass", True)
    assert 1 <= len(tuned["nodes"]) <= 5
    listed = yaml.safe_load((tmp_path / "node-precision.yaml").read_text())["FP32NodeInstanceNames"]
    assert len(listed) > len(tuned["nodes"])  # rotary angles and root mean squares stay in float32 as well


@pytest.mark.integration
def test_graph_with_names_of_its_own_is_tuned_and_explained(
    overflowing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = overflowing.parent
    monkeypatch.chdir(folder)
    (case,) = load([overflowing])
    model = onnx.load(str(Runner(store=folder / "store").pipeline(case).onnx().path))
    renamed = {"input_ids": "ids", "attention_mask": "mask", "output": "vectors"}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed[value.name]
    del model.metadata_props[:]
    onnx.save(model, "own.onnx")
    names = "inputs: {input_ids: ids, attention_mask: mask}, outputs: {output: vectors}"
    overflowing.write_text(f"{CASE}    artifacts: {{onnx: own.onnx, {names}}}\n", encoding="utf-8")
    command = [str(overflowing), "--case", "big", "--store", str(folder / "store"), "--json"]
    assert run_command(["tune", *command]) == 0
    assert 1 <= len(json.loads(capsys.readouterr().out)["nodes"]) <= 5
    assert run_command(["explain", *command, "--runtime", "sim", "--repro", "bundle"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["module"]) == ("precision", "encoder.layer.0.intermediate.dense")
    assert "overflow fp16" in found["finding"]
    assert "the error shows" in (folder / "bundle" / "ISSUE.md").read_text()


def commanded(monkeypatch: pytest.MonkeyPatch, folder: Path, tuning: Tuning, *options: str) -> int:
    """Run the command with a search that came to something; return its exit code."""
    config = folder / "cases.yaml"
    config.write_text(CASE, encoding="utf-8")
    monkeypatch.setattr(Runner, "tuned", lambda *_: tuning)
    monkeypatch.chdir(folder)
    return run_command(["tune", str(config), "--case", "big", *options])


FAILS = Result("big", "sim", "fail", "NaN in every row")
PASSES = Result("big", "sim", "pass")


def test_nothing_found_names_what_was_tried_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commanded(monkeypatch, tmp_path, Tuning(FAILS, search=Search(None, ("first", "second"), 2))) == 1
    assert capsys.readouterr().out.splitlines() == [
        "as it is: fail: NaN in every row", "no list of nodes was found in 2 trials; tried were", "  first", "  second",
    ]  # fmt: skip
    assert not (tmp_path / "node-precision.yaml").exists()


def test_case_that_passes_is_said_to_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commanded(monkeypatch, tmp_path, Tuning(PASSES)) == 0
    assert capsys.readouterr().out.startswith("as it is: pass\n")
    assert not (tmp_path / "node-precision.yaml").exists()


def test_file_is_replaced_with_force_only_and_named_relative_to_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Tuning(FAILS, PASSES, Search(("a:0",), ("a:0", "b"), 3, smallest=True), ("given", "a:0"))
    out = tmp_path / "lists" / "nodes.yaml"
    out.parent.mkdir()
    out.write_text("mine", encoding="utf-8")
    assert commanded(monkeypatch, tmp_path, found, "--out", str(out)) == 2
    assert out.read_text(encoding="utf-8") == "mine"
    assert commanded(monkeypatch, tmp_path, found, "--out", str(out), "--force") == 0
    assert yaml.safe_load(out.read_text(encoding="utf-8")) == {"FP32NodeInstanceNames": ["given", "a:0"]}
    printed = capsys.readouterr().out
    assert "with 1 nodes in float32: pass\n  a:0\n" in printed
    assert "    compile: {flags: {node-precision-info: lists/nodes.yaml}}\n" in printed


@pytest.mark.parametrize(
    ("added", "options", "message"),
    [
        ("", ("--runtime", "ort"), "it opens onnx, and node precision is compiled"),
        ("    artifacts: {qpc: some}\n", (), "leave artifacts.qpc out"),
        ("    precision: {compute: fp32}\n", (), "all nodes are in float32"),
    ],
)
def test_case_whose_nodes_cannot_be_named_is_wrong_usage(
    added: str, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases.yaml").write_text(CASE + added, encoding="utf-8")
    command = ["tune", str(tmp_path / "cases.yaml"), "--case", "big", "--out", str(tmp_path / "out.yaml")]
    assert run_command([*command, *options]) == 2
    assert message in capsys.readouterr().err
