# SPDX-License-Identifier: Apache-2.0
"""Partition configs for several devices, and int8 inputs and outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper

from qeff_validate.sdk.simulated import qpc
from qeff_validate.sdk.simulated.compiler import qaic_compile

F = TensorProto.FLOAT
node = helper.make_node


@pytest.fixture
def chain(make_model):
    names = ["first", "second", "third", ""]
    nodes = [node("Neg", [a], [b], name=n) for a, b, n in zip("xabc", "abcy", names, strict=True)]
    return make_model(nodes, {"x": (F, [3])}, {"y": (F, [3])})


def part(name: str, device: int, *nodes: str) -> dict:
    return {"name": name, "devices": [{"deviceId": device, "numCores": 4 + device}], "nodeList": list(nodes)}


@pytest.fixture
def load(tmp_path, chain, compile_onnx):
    def load(partitions, connections=()):
        path = tmp_path / "mdp.json"
        path.write_text(json.dumps({"connections": list(connections), "partitions": partitions}))
        return compile_onnx(chain, f"-mdp-load-partition-config={path}")

    return load


def test_a_pipeline(load):
    link = {"devices": [0, 1], "type": "p2p"}
    compiled = load([part("one", 0, "first", "second"), part("two", 1, "third")], [link])
    assert (compiled.code, compiled.err) == (0, "")
    header = qpc.read(compiled.directory).header
    assert (header["num_devices"], header["num_cores"]) == (2, 5)


def test_unknown_nodes_are_warnings(load):
    compiled = load([part("one", 0, "first", *map(str, range(7)))])
    assert compiled.code == 0
    assert "no node is named 0, 1, 2, 3, 4 and 2 more; ignored" in compiled.err


@pytest.mark.parametrize(
    ("partitions", "connections", "message"),
    [
        ([part("one", 0), part("one", 1)], [], "two partitions are named alike"),
        ([part("one", 0), part("two", 0)], [], "device 0 is in two partitions"),
        ([part("one", 0, "first"), part("two", 1, "first")], [], "node first is listed twice"),
        ([part("one", 0, "second"), part("two", 1, "first")], [], "reads 'a' of the later partition two"),
        ([part("one", 0)], [{"devices": [0, 1], "type": "p2p"}], "names device 1, which is in no partition"),
        ([part("one", 0)], [{"devices": [0], "type": "p2p"}], "between two devices"),
        ([part("one", 0), part("two", 1)], [{"devices": [0, 1], "type": "usb"}], "p2p or host, not 'usb'"),
        ([part("one", at) for at in range(0)], [], "names 0 devices; there must be 1 to 16"),
        ([part(str(at), at) for at in range(17)], [], "names 17 devices; there must be 1 to 16"),
        ([{**part("one", 0), "devices": [{"deviceId": 0, "numCores": 1}] * 2}], [], "twice in one partition"),
    ],
)
def test_what_does_not_fit(partitions, connections, message, load):
    compiled = load(partitions, connections)
    assert compiled.code == 255
    assert message in compiled.err


def test_a_dump_is_one_partition_of_all_named_nodes_and_loads_again(tmp_path, chain, compile_onnx):
    path = tmp_path / "dump.json"
    assert compile_onnx(chain, f"-mdp-dump-partition-config={path}", "-aic-num-cores=7").code == 0
    (partition,) = json.loads(path.read_text())["partitions"]
    assert partition["devices"] == [{"deviceId": 0, "numCores": 7}]
    assert partition["nodeList"] == ["first", "second", "third"]
    again = compile_onnx(chain, f"-mdp-load-partition-config={path}", name="again")
    assert (again.code, again.err) == (0, "")
    assert qpc.read(again.directory).header["num_cores"] == 7


INT8 = "- {IOName: x, Precision: int8, Scale: 0.25, Offset: 3}\n- {IOName: y, Precision: int8, Scale: 0.5, Offset: -5}"


@pytest.mark.parametrize("flags", [[], ["-convert-to-fp16"]])
@pytest.mark.parametrize("kind", [F, TensorProto.FLOAT16])
def test_int8_inputs_and_outputs(kind, flags, make_model, compile_onnx, client):
    """An int8 q stands for scale · (q − offset); outputs are rounded half to even, and saturate."""
    three = np.array(3, np.float16 if kind != F else np.float32)
    m = make_model([node("Mul", ["x", "k"], ["y"])], {"x": (kind, [7])}, {"y": (kind, [7])}, {"k": three})
    compiled = compile_onnx(m, *flags, custom_io=INT8)
    assert compiled.code == 0
    bindings = compiled.desc.selected_set.bindings
    assert [(b.type, b.size, b.quant_scale, b.quant_offset) for b in bindings] == [(2, 7, 0.25, 3), (2, 7, 0.5, -5)]
    x = np.array([3, 4, 5, 6, -128, 127, 0], np.int8)
    actual = client(compiled.directory).run(x=x)["y"]
    real = 3 * 0.25 * (x.astype(float) - 3)
    expected = [min(max(round(value / 0.5) - 5, -128), 127) for value in real.tolist()]
    assert actual.tolist() == expected


def test_the_old_compiler(make_linear, tmp_path, capsys, monkeypatch):
    """The command exec/qaic-exec of an old installation."""
    path = tmp_path / "m.onnx"
    path.write_bytes(make_linear("n").SerializeToString())
    named = tmp_path / "named.json"
    named.write_text(json.dumps({"specializations": [{"name": "one", "symbols": {"n": "2"}}]}))
    flat = tmp_path / "flat.json"
    flat.write_text(json.dumps({"specializations": [{"n": "2"}]}))

    def run(config, *more):
        target = tmp_path / f"qpc{len(list(tmp_path.iterdir()))}"
        argv = ["-aic-hw", f"-m={path}", f"-aic-binary-dir={target}", f"-network-specialization-config={config}", *more]
        code = qaic_compile.main(argv)
        return code, capsys.readouterr().err, target

    monkeypatch.setenv("QAIC_SIM_COMPILER", "1.20.0")
    code, _, target = run(flat, "-compile-only", "-aic-hw-version=2.0")
    assert code == 0
    assert qpc.read(target).hw_version == "ai100"
    code, err, _ = run(named, "-compile-only", "-aic-hw-version=2.0")
    assert code == 255
    assert err.startswith("[json.exception.type_error.302] type must be string, but is object")
    assert "ai200 is not known" in run(flat, "-aic-hw-version=ai200")[1]
    monkeypatch.delenv("QAIC_SIM_COMPILER")
    assert run(named, "-aic-hw-version=ai100")[0] == 0
    assert "2.0 is not known to this compiler; use ai100 or ai200" in run(flat, "-aic-hw-version=2.0")[1]
    monkeypatch.setenv("QAIC_SIM_COMPILER", "1.11")
    assert "Invalid option -retained-state" in run(flat, "-retained-state")[1]
