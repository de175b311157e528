# SPDX-License-Identifier: Apache-2.0
"""The flags and files that a case's precision gives to the compiler, read from the simulated compiler's log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from bounds import close
from onnx import TensorProto, helper

from qeff_validate.artifact import Artifact
from qeff_validate.builders.compile_qpc import compile_key, compile_qpc
from qeff_validate.builders.compiler_inputs import RESERVED_FLAGS
from qeff_validate.config.case import Compile, Precision
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.protocols import runtime
from qeff_validate.sdk.locate import simulated
from qeff_validate.sdk.simulated import qpc

F = TensorProto.FLOAT
STATES = ("past_key.0", "layer.lora_A.weight")


def compiled(
    folder: Path, precision: Precision, states: tuple[str, ...] = STATES, options: Compile | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return the compiler's arguments, and the precision of each port in the custom IO list."""
    nodes = [helper.make_node("Cos", ["x"], ["y"], name="turn")]
    nodes += [helper.make_node("Neg", [name], [f"{name}_RetainedState"]) for name in states]
    inputs = [helper.make_tensor_value_info(name, F, ["batch_size", 64]) for name in ("x", *states)]
    names = ["y", *(f"{name}_RetainedState" for name in states)]
    outputs = [helper.make_tensor_value_info(name, F, ["batch_size", 64]) for name in names]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)]
    )
    onnx.save(model, folder / "model.onnx")
    compile_qpc(
        folder / "model.onnx",
        folder,
        sdk=simulated(),
        options=options or Compile(num_cores=2),
        precision=precision,
        buckets=[{"batch_size": 2}],
    )
    argv = (folder / "compile.log").read_text(encoding="utf-8").splitlines()[0].split()
    path = folder / "custom_io.yaml"
    listed = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
    return argv, {entry["IOName"]: entry["Precision"] for entry in listed}


def pairs(kinds: dict[str, str]) -> dict[str, str]:
    return {name + end: kind for name, kind in kinds.items() for end in ("", "_RetainedState")}


def test_compressed_weights_and_cache(tmp_path: Path) -> None:
    """An adapter is state too, and stays in fp16."""
    argv, kinds = compiled(tmp_path, Precision(weights="mxfp6", kv="mxint8"))
    assert {"-mxfp6-matmul", "-convert-to-fp16"} <= set(argv)
    assert kinds == pairs({"past_key.0": "mxint8", "layer.lora_A.weight": "float16"})
    assert qpc.read(tmp_path / "qpc").header["mxint8"] == ["past_key.0"]


def test_cache_is_compressed_in_float32_too(tmp_path: Path) -> None:
    argv, kinds = compiled(tmp_path, Precision(compute="fp32", kv="mxint8"))
    assert not {"-mxfp6-matmul", "-convert-to-fp16"} & set(argv)
    assert kinds == pairs({"past_key.0": "mxint8"})
    assert not any(word.startswith("-node-precision-info") for word in argv)


def test_angles_are_not_compressed_in_float32_either(tmp_path: Path) -> None:
    argv, kinds = compiled(tmp_path, Precision(compute="fp32", weights="mxfp6"))
    assert "-mxfp6-matmul" in argv
    assert any(word.startswith("-node-precision-info") for word in argv)
    assert kinds == {}


def test_float32_adds_no_precision_flag(tmp_path: Path) -> None:
    argv, kinds = compiled(tmp_path, Precision(compute="fp32"))
    assert kinds == {}
    assert not any(word.partition("=")[0] in ("-mxfp6-matmul", "-node-precision-info") for word in argv)


def test_compressed_cache_of_a_graph_without_keys_and_values_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision\.kv: mxint8: the graph retains no keys and values"):
        compiled(tmp_path, Precision(kv="mxint8"), STATES[1:])


def test_precision_flags_are_refused_in_compile_flags() -> None:
    """Otherwise a case could be compressed and judged with the bounds of an uncompressed one."""
    assert {"mxfp6-matmul", "custom-IO-list-file"} <= RESERVED_FLAGS


def test_key_of_a_program_knows_a_node_precision_file_by_its_content(tmp_path: Path) -> None:
    def key(file: Path) -> object:
        options = Compile(flags={"node-precision-info": str(file)})
        return compile_key(options, Precision(), [], simulated())

    files = [tmp_path / name for name in ("a.yaml", "b.yaml")]
    for file in files:
        file.write_text("FP32NodeInstanceNames: [y]", encoding="utf-8")
    first = key(files[0])
    assert first == key(files[1])
    files[0].write_text("FP32NodeInstanceNames: [x]", encoding="utf-8")
    assert first != key(files[0])
    key(tmp_path / "missing.yaml")  # the compiler will say so


@pytest.mark.numeric
def test_program_for_two_cards_runs_on_two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
    options = Compile(num_cores=3, num_devices=2)
    compiled(tmp_path, Precision(compute="fp32"), (), options)
    header = qpc.read(tmp_path / "qpc").header
    assert (header["num_devices"], header["num_cores"]) == (2, 3)
    provenance = {"key": {"compile": {"options": options.model_dump(mode="json")}}}
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)
    with runtime("sim").open(Artifact("qpc", tmp_path / "qpc", "0" * 64, provenance)) as session:
        close(session.run({"x": x})["y"], np.cos(x), rtol=5e-6)
    monkeypatch.setenv("QAIC_SIM_DEVICES", "1")
    with (
        pytest.raises(Unavailable, match="is compiled for 2 cards, and 1 are Ready"),
        runtime("sim").open(Artifact("qpc", tmp_path / "qpc", "0" * 64, provenance)),
    ):
        pass


def test_number_of_cards_beside_a_partition_config_is_an_error(tmp_path: Path) -> None:
    options = Compile(num_devices=2, flags={"mdp_load_partition_config": "p.json"})
    with pytest.raises(ConfigError, match=r"compile\.num_devices: 2 and compile\.flags\.mdp-load-partition-config"):
        compiled(tmp_path, Precision(), (), options)
