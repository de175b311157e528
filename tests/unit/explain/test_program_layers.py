# SPDX-License-Identifier: Apache-2.0
"""A fault that lives in a compiler or a device alone is found in its layer, and shown by a bundle."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sdk_prefix

from qeff_validate.cli.app import run_command

pytestmark = pytest.mark.integration

DEFECT = """
    import onnx
    from onnx import helper, numpy_helper

    path = next(argument[3:] for argument in sys.argv if argument.startswith("-m="))
    model = onnx.load(path)
    wrong = [node for node in model.graph.node if node.op_type == "Softmax" and {where}]
    for node in wrong[{first}:{first} + 1]:
        name = node.output[0]
        node.output[0] = name + "/right"
        model.graph.initializer.append(numpy_helper.from_array(__import__("numpy").float32(1.1), "factor"))
        place = list(model.graph.node).index(node) + 1
        model.graph.node.insert(place, helper.make_node("Mul", [name + "/right", "factor"], [name]))
    changed = Path({folder!r}) / f"{{os.getpid()}}.onnx"
    onnx.save(model, str(changed))
    sys.argv = [f"-m={{changed}}" if argument.startswith("-m=") else argument for argument in sys.argv]
"""
"""A compiler that scales the probabilities of one attention by 1.1, and is right otherwise."""

BERT = """\
cases:
  - name: deep
    source: random:bert
    config: {hidden_size: 32, num_hidden_layers: 6, num_attention_heads: 2, intermediate_size: 37, vocab_size: 97,
      initializer_range: 0.2}
    inputs: {texts: ["a b c", "d e f g", "the man"]}
    options: {seq_len: [16], batch_size: 2}
    exporter: torchscript
"""

LLAMA = """\
cases:
  - name: deep
    model: peft-causal-lm
    source: random:llama
    config: {num_hidden_layers: 3}
    options: {peft_method: lora, peft: {init: 0.1, r: 4, target_modules: [q_proj]}, max_new_tokens: 4,
      prefill_seq_len: 4, ctx_len: 32}
    inputs: {texts: ["a b c d e f g", "the man"]}
"""


def explained(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, Any]:
    """Return the explanation of a case that fails on the card's double."""
    (folder / "cases.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    command = ["explain", "cases.yaml", "--case", "deep", "--store", str(folder / "store"), "--json", *options]
    assert run_command(command) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def card(folder: Path, monkeypatch: pytest.MonkeyPatch, *, first: int, where: str = "True") -> Path:
    """Return the prefix of an SDK whose compiler has a defect in one attention."""
    compiler = DEFECT.format(first=first, where=where, folder=str(folder)) + sdk_prefix.COMPILES
    prefix = sdk_prefix.prefix(folder / "sdk", compiler=compiler)
    monkeypatch.setenv("QEFF_VALIDATE_SDK", str(prefix))
    return prefix


def reproduced(folder: Path, prefix: Path) -> tuple[int, str]:
    command = [sys.executable, str(folder / "repro.py"), "--sdk", str(prefix)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_defect_of_a_compiler_is_found_in_its_layer_by_bisection_and_shown_by_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = card(tmp_path, monkeypatch, first=0, where='"layer.3/" in node.name')
    options = ("--runtime", "ai100", "--repro", "bundle")
    found = explained(tmp_path, BERT, monkeypatch, capsys, *options)
    assert (found["stage"], found["module"]) == ("compiler and runtime", "encoder.layer.3.attention.self")
    assert re.match(r"its output is scaled by 1\.(09|10)", found["finding"])
    search = found["program"]
    assert search["compilations"] <= math.log2(6) + 2
    assert search["observer"] == 0
    errors = {item["module"]: item["error"] / item["expected"] for item in search["boundaries"]}
    assert len(errors) < 6  # some boundaries, not all
    assert all((ratio > 3) == (int(module.split(".")[2]) >= 3) for module, ratio in errors.items())

    bundle = tmp_path / "bundle"
    code, text = reproduced(bundle, prefix)
    assert (code, text.splitlines()[-1]) == (1, "the error shows"), text
    about = json.loads((bundle / "repro.json").read_text())
    assert about["rows"] == 1
    assert "-convert-to-fp16" in about["compiler"]
    assert "--sdk" in (bundle / "ISSUE.md").read_text()
    sdk_prefix.set_compiler(prefix, sdk_prefix.COMPILES)
    code, text = reproduced(bundle, prefix)
    assert (code, text.splitlines()[-1]) == (0, "the error is gone"), text
    assert reproduced(bundle, tmp_path / "nothing")[0] == 3


def test_language_model_needs_no_bisection_because_keys_and_values_are_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card(tmp_path, monkeypatch, first=1)
    found = explained(tmp_path, LLAMA, monkeypatch, capsys, "--runtime", "ai100")
    assert (found["stage"], found["module"]) == ("compiler and runtime", "model.layers.1.self_attn")
    assert re.match(r"its output is scaled by 1\.(09|10)", found["finding"])
    assert re.fullmatch(r"row \d+ \('.*', step \d\)", found["row"])
    search = found["program"]
    assert search["compilations"] == 2
    assert {"past_key.0", "past_value.1", "past_key.2"} <= {item["module"] for item in search["boundaries"]}


def test_rounding_that_was_asked_for_is_told_from_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = "/module/base_model/encoder/layer.2/output/LayerNorm/LayerNormalization_output_0"
    (tmp_path / "nodes.yaml").write_text(f'FP16NodeInstanceNames: ["{node}"]\n')
    extra = "    precision: {compute: fp32}\n    compile: {flags: {node-precision-info: nodes.yaml}}\n"
    found = explained(tmp_path, BERT + extra, monkeypatch, capsys, "--runtime", "sim", "--repro", "bundle")
    assert (found["stage"], found["module"]) == ("precision", "encoder.layer.2.output.LayerNorm")
    assert found["finding"] == "rounding to fp16 makes this error"
    # the bundle holds the part of the list that it needs, and has run on the simulated SDK laid out as an installation
    bundle = tmp_path / "bundle"
    assert node in (bundle / "node_precision.yaml").read_text()
    assert "-node-precision-info=node_precision.yaml" in json.loads((bundle / "repro.json").read_text())["compiler"]
    assert "the error shows" in (bundle / "ISSUE.md").read_text()
