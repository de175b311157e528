# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import struct
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx
import pytest

from qeff_validate.sdk.simulated import qpc
from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.bindings import qaicrt as rt
from qeff_validate.sdk.simulated.errors import QpcError


@pytest.fixture
def compiled(make_linear, compile_onnx):
    return compile_onnx(make_linear(2), "-convert-to-fp16", "-aic-num-cores=4")


def test_header(compiled):
    header = dict(qpc.read(compiled.directory).header)
    segments = header.pop("segments")
    assert header == {
        "simulated": True, "num_cores": 4, "num_devices": 1, "hw_version": "ai100", "precision": "fp16",
        "sdk_version": "1.22.0.120", "retained": {}, "mxint8": [], "in_place": [],
    }  # fmt: skip
    assert set(segments) == {"constants", "network.onnx", "iodesc"}


def test_weights_are_once_in_the_file_and_page_aligned(compiled):
    program = qpc.read(compiled.directory)
    network = onnx.load_from_string(program.network)
    (stub,) = [t for t in network.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    place = {entry.key: entry.value for entry in stub.external_data}
    assert place == {"location": "programqpc.bin", "offset": "4096", "length": "4096"}
    data = compiled.file.read_bytes()
    weight = data[4096:8192]
    assert data.count(weight[:64]) == 1
    values = np.frombuffer(weight, np.float32)
    assert np.array_equal(values, values.astype(np.float16)), "stored rounded"
    assert network.ir_version <= 10


def test_weights_are_mapped_not_read(compiled):
    program = qpc.read(compiled.directory)
    session = qpc.open_session(program, check_only=True)
    with open("/proc/self/maps") as maps:
        assert any(str(compiled.file) in line for line in maps)
    del session


@pytest.mark.parametrize("most", [4095, 4096])
def test_large_constants_are_not_copied_into_memory(compiled, monkeypatch, most):
    monkeypatch.setattr(qpc, "MOST_PACKED", most)
    options = qpc.open_session(qpc.read(compiled.directory)).get_session_options()
    with nullcontext() if most < 4096 else pytest.raises(RuntimeError, match="disable_prepacking"):
        assert options.get_session_config_entry("session.disable_prepacking") == "1"


def test_several_weights_each_on_a_page(make_model, compile_onnx, client):
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.normal(size=(300 + i,)).astype(np.float32) for i in range(3)}
    nodes = [onnx.helper.make_node("Concat", ["x", *weights], ["y"], axis=0)]
    m = make_model(nodes, {"x": (1, [1])}, {"y": (1, [904])}, weights)
    m.ir_version = 11
    compiled = compile_onnx(m)
    network = onnx.load_from_string(qpc.read(compiled.directory).network)
    assert network.ir_version == 10
    offsets = [int(e.value) for t in network.graph.initializer for e in t.external_data if e.key == "offset"]
    assert offsets == [4096, 8192, 12288]
    actual = client(compiled.directory).run(x=np.zeros(1, np.float32))["y"]
    assert np.array_equal(actual, np.concatenate([[0], *weights.values()]).astype(np.float32))


def test_missing(tmp_path):
    with pytest.raises(QpcError, match=f"Failed to open file{tmp_path}/programqpc.bin"):
        qpc.read(tmp_path)


def test_real_card_qpc(tmp_path):
    (tmp_path / "programqpc.bin").write_bytes(struct.pack("<IHHHQ", 0x00A1CD7C, 0, 1, 0, 4096) + bytes(4096))
    with pytest.raises(QpcError, match="real card"):
        qpc.read(tmp_path)


def test_foreign_file(tmp_path):
    (tmp_path / "programqpc.bin").write_bytes(b"PK\x03\x04" + bytes(9000))
    with pytest.raises(QpcError, match="not a QPC"):
        qpc.read(tmp_path)


def test_other_format_version(compiled):
    data = bytearray(compiled.file.read_bytes())
    data[8] = 99
    compiled.file.write_bytes(data)
    with pytest.raises(QpcError, match="format 99"):
        qpc.read(compiled.directory)


@pytest.mark.parametrize("keep", [0, 3, 8, 20, 39, 40, 4096, 4100, 8192, 8300, -300, -1])
def test_truncated(keep, compiled):
    compiled.file.write_bytes(compiled.file.read_bytes()[:keep])
    with pytest.raises(QpcError, match="truncated or corrupt"):
        qpc.read(compiled.directory)


@pytest.mark.parametrize("extra", [b"\0", bytes(5000)])
def test_too_long(extra, compiled):
    compiled.file.write_bytes(compiled.file.read_bytes() + extra)
    with pytest.raises(QpcError, match="truncated or corrupt"):
        qpc.read(compiled.directory)


def test_a_flipped_bit_is_found_in_every_segment(compiled):
    good = compiled.file.read_bytes()
    segments = qpc.read(compiled.directory).header["segments"]
    places = [entry["offset"] + entry["size"] // 2 for entry in segments.values()]
    for place in [*places, len(good) - 5, 12, 16, 24, 32]:
        data = bytearray(good)
        data[place] ^= 0x10
        compiled.file.write_bytes(data)
        with pytest.raises(QpcError, match="corrupt"):
            qpc.read(compiled.directory)


def write(directory, compiled, **changes):
    """Rewrite the network of a compiled program with a change."""
    program = qpc.read(compiled.directory)
    facts = {"num_cores": 4, "num_devices": 1, "hw_version": "ai100", "precision": "fp16", "sdk_version": "1"}
    arguments = {
        "model": onnx.ModelProto(),
        "weights": [],
        "io_desc": program.io_desc,
        "facts": facts,
        **changes,
    }
    return qpc.write(directory, **arguments)


def test_a_failing_writer_leaves_nothing(tmp_path, compiled):
    def fail(program):
        assert program.path.exists()
        raise RuntimeError("refused")

    for directory in (tmp_path / "new", tmp_path / "old"):
        if directory.name == "old":
            directory.mkdir()
        with pytest.raises(RuntimeError, match="refused"):
            write(directory, compiled, verify=fail)
        assert not directory.exists() or list(directory.iterdir()) == []


def test_a_short_weight_is_not_written(tmp_path, compiled):
    from qeff_validate.sdk.simulated.weights import Weight

    model = onnx.ModelProto()
    model.graph.initializer.add(name="w", data_type=1, dims=[1024], data_location=onnx.TensorProto.EXTERNAL)
    short = Weight("w", 1, 4096, lambda: iter([bytes(4000)]))
    with pytest.raises(RuntimeError, match="4096"):
        write(tmp_path / "new", compiled, model=model, weights=[short])
    assert not (tmp_path / "new").exists()
    write(tmp_path / "new", compiled, model=model, weights=[replace(short, chunks=lambda: iter([bytes(4096)]))])
    assert (tmp_path / "new" / "programqpc.bin").exists()


def test_another_hardware_generation_does_not_load(tmp_path, compiled, capsys):
    facts = {**qpc.read(compiled.directory).header, "hw_version": "ai200"}
    facts.pop("segments")
    write(tmp_path / "ai200", compiled, facts=facts)
    context = rt.Context()
    program = rt.Program(context, 0, rt.Qpc(str(tmp_path / "ai200")), rt.QAicProgramProperties())
    assert program.load() != rt.QStatus.QS_SUCCESS
    assert "HW Version incompatible, program expects:Major Version 3" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="Failed to create ExecObj"):
        rt.ExecObj(context, program)


def test_protobuf_numbers():
    assert aicapi.bufferIoDataTypeEnum.Value("BFLOAT16_TYPE") == aicapi.BFLOAT16_TYPE == 11
    assert aicapi.bufferIoDataTypeEnum.Name(0xFF) == "TYPE_INVALID"
    assert aicapi.bufferIoDirectionEnum.keys() == ["BUFFER_IO_TYPE_INPUT", "BUFFER_IO_TYPE_OUTPUT"]
    constants = {name: getattr(aicapi, name) for name in list(aicapi.bufferIoDataTypeEnum.keys())}
    assert constants == dict(aicapi.bufferIoDataTypeEnum.items())
    binding = aicapi.IoBinding(name="a", index=1, dims=[2, 3], size=24, is_valid=True)
    # Field numbers as in card-contract §3.2: 1 name, 2 index, 7 dims (packed), 8 size, 20 is_valid.
    assert binding.SerializeToString().hex() == "0a0161" + "1001" + "3a020203" + "4018" + "a00101"
    desc = aicapi.IoDesc(selected_set=aicapi.IoSet(name="default", bindings=[binding]), program_name="p")
    desc.allowed_shapes.add().shapes.add(type=1, dims=[4])
    assert aicapi.IoDesc.FromString(desc.SerializeToString()) == desc
    assert json.loads(json.dumps([f.name for f in aicapi.IoDesc.DESCRIPTOR.fields])) == [
        "io_sets", "selected_set", "program_name", "dma_buf", "runtime_constants", "pre_process_skip_stages",
        "post_process_skip_stages", "allowed_shapes",
    ]  # fmt: skip
    assert aicapi.DmaBuf(index=1).index
    assert aicapi.DmaBufInfo(dma_size=1).dma_size
    assert aicapi.RuntimeConstants(size=1).size
