# SPDX-License-Identifier: Apache-2.0
"""Inputs of the simulated compiler: opsets, external data, static dims, custom IO, flags with an effect."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from bounds import close
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.sdk.simulated import qpc
from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.compiler import qaic_compile

F, F16, F64, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64
node = helper.make_node
ROOT = Path(__file__).parents[5]


def refused(compiled, *texts: str) -> None:
    assert compiled.code == 255
    for text in texts:
        assert text in compiled.err
    assert "Traceback" not in compiled.err
    assert not compiled.directory.exists()


@pytest.mark.parametrize("opset", [1, 10, 22, 23])
def test_other_opsets_are_refused_with_the_numbers(opset, make_model, compile_onnx):
    m = make_model([node("Neg", ["x"], ["y"])], {"x": (F, [2])}, {"y": (F, [2])}, opset=opset)
    refused(compile_onnx(m), f"opset {opset} is not supported", "11 to 21", f"opset_version-{opset}")


@pytest.mark.parametrize("ir_version", [4, 8, 10, 12])
def test_ir_versions_are_capped_not_refused(ir_version, make_linear, compile_onnx):
    m = make_linear(2)
    m.ir_version = ir_version
    network = onnx.load_from_string(qpc.read(compile_onnx(m).directory).network)
    assert network.ir_version == min(ir_version, 10)


# External data


def external(tensor, location: str, offset: int | str, length: int | None = None) -> None:
    """Move a tensor's data to an external file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


@pytest.fixture
def split(tmp_path, make_linear):
    """A model with two weights in two external files, one of them at an offset."""
    m = make_linear(2)
    w, b = (numpy_helper.to_array(tensor) for tensor in m.graph.initializer)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w").write_bytes(bytes(4096) + w.tobytes() + bytes(5))
    (tmp_path / "b").write_bytes(b.tobytes())
    external(m.graph.initializer[0], "data/w", 4096, w.nbytes)
    external(m.graph.initializer[1], "b", 0)
    return m, w, b


def test_several_files_and_offsets(split, compile_onnx, client):
    m, w, b = split
    x = np.eye(2, 32, dtype=np.float32)
    actual = client(compile_onnx(m).directory).run(x=x)["y"]
    assert np.array_equal(actual, w[:2] + b)


@pytest.mark.parametrize(
    ("name", "offset", "length"), [("short", 4102, 4096), ("bad", "x", 4096), ("negative", -1, 4096), ("lies", 0, 4000)]
)
def test_places_that_do_not_fit(name, offset, length, split, compile_onnx):
    m, _, _ = split
    del m.graph.initializer[0].external_data[:]
    external(m.graph.initializer[0], "data/w", offset, length)
    refused(compile_onnx(m), "'W' does not fit", "data/w")


def test_external_data_of_a_node(tmp_path, make_model, compile_onnx, client):
    values = np.arange(400, dtype=np.float32)
    (tmp_path / "c").write_bytes(values.tobytes())
    constant = node("Constant", [], ["c"], value=numpy_helper.from_array(values))
    external(constant.attribute[0].t, "c", 0, values.nbytes)
    m = make_model([constant, node("Add", ["x", "c"], ["y"])], {"x": (F, [1])}, {"y": (F, [400])})
    assert np.array_equal(client(compile_onnx(m).directory).run(x=np.ones(1, np.float32))["y"], values + 1)


SPY = """
import resource, sys
import numpy as np
from qeff_validate.sdk.simulated.compiler import qaic_compile
from qeff_validate.sdk.simulated import qpc

def spy(program, **options):
    session = opened(program, **options)
    print("VALUES", set(session.run(None, {"row": np.array([7])})[0].ravel().tolist()))
    return session

opened, qpc.open_session = qpc.open_session, spy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = qaic_compile.main(sys.argv[1:])
print("KIB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


@pytest.fixture
def roomy(tmp_path):
    """A folder for gigabytes that are read once: in memory, if it is large enough."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 6 * 2**30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_weights_above_2_gb_are_streamed(roomy, make_model):
    """Eight weights of 256 MiB, which share their data, and a small one; the compiler may hold a few chunks."""
    names = [f"W{i}" for i in range(9)]
    nodes = [node("Gather", [name, "row"], [f"g{name}"]) for name in names]
    nodes.append(node("Sum", [f"g{name}" for name in names], ["y"]))
    m = make_model(nodes, {"row": (I64, [1])}, {"y": (F, [1, 1024])})
    with (roomy / "data").open("wb") as file:
        file.truncate(2**28)
        file.seek(7 * 4096)
        file.write(np.full(1024, 1.5, np.float32).tobytes())
    for name in names:
        rows = 8 if name == "W8" else 2**16
        tensor = m.graph.initializer.add(name=name, data_type=F, dims=[rows, 1024])
        external(tensor, "data", 0, rows * 4096)
    (roomy / "m.onnx").write_bytes(m.SerializeToString())
    flags = ["-aic-hw", f"-m={roomy / 'm.onnx'}", f"-aic-binary-dir={roomy / 'qpc'}"]
    done = subprocess.run([sys.executable, "-c", SPY, *flags], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "VALUES {13.5}" in done.stdout
    assert int(done.stdout.rsplit("KIB", 1)[1]) < 400 * 1024
    program = roomy / "qpc" / "programqpc.bin"
    assert program.stat().st_size > 2**31
    program.unlink()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_are_stored_once_whatever_the_specializations(count, tmp_path, make_model, compile_onnx):
    weight = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("MatMul", ["h", "W"], ["y"])]
    m = make_model(nodes, {"x": (F, ["n", 512])}, {"y": (F, ["n", 512])}, {"W": weight})
    compiled = compile_onnx(m, "-convert-to-fp16", specs=[{"n": str(n + 1)} for n in range(count)])
    assert compiled.file.stat().st_size <= 1.1 * weight.nbytes


# Static dims


def test_constants_and_shapes_decide_about_dims(make_model, compile_onnx, client):
    """Operands that are computed from shapes are known at compile time, through any number of nodes."""
    nodes = [
        node("Shape", ["x"], ["s"], start=0, end=1),
        node("Squeeze", ["s"], ["n"]),
        node("Range", ["zero", "n", "one"], ["r"]),
        node("Unsqueeze", ["r", "first"], ["column"]),
        node("Concat", ["s", "s"], ["square"], axis=0),
        node("Expand", ["column", "square"], ["grid"]),
        node("Greater", ["grid", "r"], ["below"]),
        node("NonZero", ["r"], ["places"]),
        node("Cast", ["below"], ["y"], to=F),
        node("Cast", ["places"], ["z"], to=F),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "first": np.array([1])}
    m = make_model(nodes, {"x": (F, ["n"])}, {"y": (F, ["n", "n"]), "z": (F, [1, 2])}, weights)
    actual = client(compile_onnx(m, specs=[{"n": "3"}]).directory).run(x=np.zeros(3, np.float32))
    assert np.array_equal(actual["y"], np.tri(3, k=-1))
    assert actual["z"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("Expand", ["x", "ids"], "'shape' input must be a constant tensor"),
        ("Tile", ["x", "ids"], "'repeats' input must be a constant tensor"),
        ("Trilu", ["x", "number"], "'diagonal' input must be a constant tensor"),
        ("Reshape", ["x", "ids"], "'shape' input must be a constant tensor"),
        ("ConstantOfShape", ["ids"], "'input' input must be a constant tensor"),
        ("Slice", ["x", "one", "ids"], "'starts' input must be a constant tensor"),
        ("Pad", ["x", "ids"], "'pads' input must be a constant tensor"),
        ("Range", ["number", "number", "number"], "Range: 'start' input must be a constant tensor"),
        ("OneHot", ["ids", "one", "pair"], "'depth' input must be a constant tensor"),
        ("TopK", ["x", "one"], "'K' input must be a constant tensor"),
        ("NonZero", ["x"], "depend on data"),
        ("Unique", ["x"], "depend on data"),
    ],
)
def test_operands_from_data_are_refused(operator, inputs, text, make_model, compile_onnx):
    outputs = ["y", "place"] if operator == "TopK" else ["y"]
    kinds = {"Range": I64, "NonZero": I64}
    m = make_model(
        [node(operator, inputs, outputs, name="here")],
        {"x": (F, [2, 2]), "ids": (I64, [2]), "number": (I64, []), "one": (I64, [1])},
        {"y": (kinds.get(operator, F), ["a", "b"])},
        {"pair": np.array([0, 1], np.float32)},
    )
    refused(compile_onnx(m), f"Operator-'{operator}'", text, "'here'")


def test_random_values_are_data(make_model, compile_onnx):
    nodes = [
        node("RandomNormal", [], ["r"], shape=[2]),
        node("Cast", ["r"], ["c"], to=I64),
        node("Expand", ["x", "c"], ["y"]),
    ]
    refused(compile_onnx(make_model(nodes, {"x": (F, [1])}, {"y": (F, ["a", "b"])})), "Expand", "constant")


def test_inside_of_a_branch(make_model, compile_onnx):
    def branch(*nodes):
        return helper.make_graph(list(nodes), "b", [], [helper.make_tensor_value_info(nodes[-1].output[0], F, None)])

    nodes = [
        node("If", ["flag"], ["y"], then_branch=branch(node("Expand", ["x", "ids"], ["t"])),
             else_branch=branch(node("Expand", ["x", "two"], ["e"]))),
    ]  # fmt: skip
    m = make_model(nodes, {"x": (F, [1]), "ids": (I64, [1]), "flag": (TensorProto.BOOL, [])}, {"y": (F, [2])},
                   {"two": np.array([2])})  # fmt: skip
    refused(compile_onnx(m), "Expand", "'t'")


def test_a_left_over_symbol_of_an_output_is_named(make_model, compile_onnx):
    """The number of iterations of a Loop is not inferred, so only the symbol of its output gives the size."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Identity", ["i"], ["seen"])], "b",
        [helper.make_tensor_value_info("i", I64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("seen", I64, [])],
    )  # fmt: skip
    m = make_model([node("Loop", ["n", "yes"], ["y"], body=body)], {"n": (I64, [])}, {"y": (I64, ["turns"])},
                   {"yes": np.array(True)})  # fmt: skip
    refused(compile_onnx(m), "All dims must be static", "symbol turns has no value", "'y'")
    assert compile_onnx(m, "-onnx-define-symbol=turns,3").code == 0


def test_a_wrong_declaration_is_refused(make_model, compile_onnx):
    m = make_model([node("Concat", ["x", "x"], ["y"], axis=0)], {"x": (F, ["n"])}, {"y": (F, ["n"])})
    refused(compile_onnx(m, specs=[{"n": "3"}]), "'y' is declared as [3], but computed as [6]")


def test_float64_inside_is_a_warning(make_model, compile_onnx, client):
    nodes = [node("Cast", ["x"], ["wide"], to=F64), node("Mul", ["wide", "k"], ["m"]), node("Cast", ["m"], ["y"], to=F)]
    m = make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])}, {"k": np.array(1 / 3)})
    compiled = compile_onnx(m, "-convert-to-fp16")
    assert "3 values are float64, 'k' is the first" in compiled.err
    actual = client(compiled.directory).run(x=np.array([1, 3], np.float32))["y"]
    assert np.array_equal(actual, np.array([1 / 3, 1]).astype(np.float16).astype(np.float32))


# Symbols


def test_a_key_twice_in_one_entry(make_linear, compile_onnx):
    text = '{"specializations": [{"batch_size": "1", "batch_size": "2"}]}'
    refused(compile_onnx(make_linear(), specs=text), "batch_size is there twice")


def test_defined_symbols_fill_what_entries_leave(make_model, compile_onnx):
    m = make_model([node("Neg", ["x"], ["y"])], {"x": (F, ["b", "s", "h"])}, {"y": (F, ["b", "s", "h"])})
    flags = ("-onnx-define-symbol=b,2", "-onnx-define-symbol=h,4", "-onnx-define-symbol=b,2")
    compiled = compile_onnx(m, *flags, specs=[{"s": "8"}, {"s": "1", "b": "3"}])
    assert [list(e.shapes[0].dims) for e in compiled.desc.allowed_shapes] == [[2, 8, 4], [3, 1, 4]]
    refused(compile_onnx(m, *flags[:1], specs=[{"s": "8"}], name="left"), "symbol h", "'x'")
    refused(compile_onnx(m, "-onnx-define-symbol=b,2", "-onnx-define-symbol=b,3", name="two"), "b two values, 2 and 3")


# Custom IO


def cache_model(make_model):
    kv = {name: (F, ["batch", 2, "ctx_len", 4]) for name in ("past_key.0", "past_value.0")}
    nodes = [node("Add", [name, "ids_f"], [f"{name}_RetainedState"]) for name in kv]
    nodes = [node("Cast", ["input_ids"], ["ids_f"], to=F), *nodes, node("ReduceSum", ["past_key.0"], ["logits"])]
    outputs = {f"{name}_RetainedState": spec for name, spec in kv.items()}
    return make_model(nodes, {"input_ids": (I64, ["batch", 1, 1, 1]), **kv}, {"logits": (F, [1, 1, 1, 1]), **outputs})


def test_custom_io_of_a_cache(make_model, compile_onnx, client):
    """As QEfficient writes it: state in fp16 on both sides, other ports unchanged."""
    names = [f"past_{kind}.0{side}" for kind in ("key", "value") for side in ("", "_RetainedState")]
    text = "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in names)
    compiled = compile_onnx(
        cache_model(make_model), "-convert-to-fp16", custom_io=text, specs=[{"batch": "1", "ctx_len": "8"}]
    )
    assert (compiled.code, compiled.err) == (0, "")
    types = {b.name: b.type for b in compiled.desc.selected_set.bindings}
    assert types == {
        "input_ids": aicapi.INT64_I_TYPE, "logits": aicapi.FLOAT_TYPE, **dict.fromkeys(names, aicapi.FLOAT_16_TYPE)
    }  # fmt: skip
    assert [s.type for s in compiled.desc.allowed_shapes[0].shapes] == [
        types[b.name] for b in compiled.desc.selected_set.bindings
    ]
    state = np.random.default_rng(0).normal(size=(1, 2, 8, 4)).astype(np.float16)
    feeds = {"past_key.0": state, "past_value.0": -state}
    actual = client(compiled.directory).run(input_ids=np.full((1, 1, 1, 1), 3), **feeds)
    assert np.array_equal(actual["past_key.0_RetainedState"], state + np.float16(3))
    assert np.array_equal(actual["past_value.0_RetainedState"], np.float16(3) - state)


@pytest.mark.numeric
@pytest.mark.parametrize("operator", ["ScatterND", "ScatterElements"])
@pytest.mark.parametrize("flags", [("-convert-to-fp16",), ()], ids=["fp16", "fp32"])
def test_a_cache_in_fp16_is_written_as_such(flags, operator, make_model, compile_onnx, client):
    """In fp16 mode new slots are written to the client's cache, and the sum must read them from there."""
    elements = operator == "ScatterElements"
    nodes = [
        node("Mul", ["new", "k"], ["updates"]),
        node(operator, ["past", "slots", "updates"], ["past_RetainedState"], **({"axis": 0} if elements else {})),
        node("ReduceSum", ["past_RetainedState"], ["y"], keepdims=0),
        node("ReduceSum", ["past"], ["before"], keepdims=0),
    ]
    shape = [2, 4]
    inputs = {"new": (F, shape), "past": (F, [8, 4]), "slots": (I64, shape if elements else [2, 1])}
    outputs = {"past_RetainedState": (F, [8, 4]), "y": (F, []), "before": (F, [])}
    m = make_model(nodes, inputs, outputs, {"k": np.float32(1 / 3)})
    text = "- {IOName: past, Precision: float16}\n- {IOName: past_RetainedState, Precision: float16}\n"
    compiled = compile_onnx(m, *flags, custom_io=text)
    rng = np.random.default_rng(0)
    past, new = rng.normal(size=(8, 4)).astype(np.float16), rng.normal(size=shape).astype(np.float32)
    slots = np.array([[5], [2**31 - 1]])
    c = client(compiled.directory)
    actual = c.run(new=new, past=past, slots=np.broadcast_to(slots, shape).copy() if elements else slots)
    expected = past.copy()
    row = new[0].astype(np.float16).astype(np.float32) * np.float32(np.float16(1 / 3)) if flags else new[0] / 3
    expected[5] = row.astype(np.float16)
    assert np.array_equal(actual["past_RetainedState"], expected)
    close(actual["y"], expected.sum(dtype=np.float64), atol=1e-2)
    close(actual["before"], past.sum(dtype=np.float64), atol=1e-2)
    graph = onnx.load_from_string(qpc.read(compiled.directory).network).graph
    (scatter,) = [entry for entry in graph.node if entry.op_type == "ScatterND"]
    straight = scatter.input[0] == "past" and scatter.output[0] == "past_RetainedState"
    assert straight == bool(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {IOName: x, Precision: float16, Layout: NHWC}", "Layout NHWC of 'x' is not simulated"),
        ("- {IOName: x, Precision: float16, Scale: 0.5}", "Scale and Offset of 'x' are for int8"),
        ("- {IOName: x, Precision: int8, Scale: 0}", "Scale of 'x' is a positive number, not 0"),
        ("- {IOName: x, Precision: int8, Scale: .nan}", "Scale of 'x' is a positive number, not nan"),
        ("- {IOName: x, Precision: int8, Offset: 128}", "Offset of 'x' is a whole number from -128 to 127, not 128"),
        ("- {IOName: x, Precision: mxint8}", "mxint8 of 'x' is simulated for retained state only"),
        ("- {IOName: x, Precision: int4}", "int4 of input 'x' is not simulated"),
        ("- {IOName: x, Precision: float16}\n- {IOName: x, Precision: float}", "'x' is there twice"),
        ("- {IOName: x, Precision: bfloat16}", "bfloat16 is of ai200 only"),
        ("- {IOName: X, Precision: float16}", "no IO is named X; the model has x, y"),
    ],
)
def test_custom_io_that_is_not_simulated(text, message, make_linear, compile_onnx):
    refused(compile_onnx(make_linear(2), custom_io=text), message)


def test_custom_io_with_keys_that_ask_for_nothing(make_linear, compile_onnx):
    text = """
    - {IOName: x, Precision: float16, Layout: NCHW, Scale: 1.0, Offset: 0}
    - {IOName: y, Precision: float, Colour: 3}"""
    compiled = compile_onnx(make_linear(2), custom_io=text)
    assert compiled.code == 0
    assert compiled.err == "warning: custom IO: Colour of 'y' is not known and ignored\n"
    assert [b.type for b in compiled.desc.selected_set.bindings] == [aicapi.FLOAT_16_TYPE, aicapi.FLOAT_TYPE]


def test_the_template_lists_float_io_and_compiles(tmp_path, make_model, compile_onnx):
    m = cache_model(make_model)
    (tmp_path / "m.onnx").write_bytes(m.SerializeToString())
    path = tmp_path / "template.yaml"
    assert qaic_compile.main([f"-m={tmp_path / 'm.onnx'}", f"-dump-custom-IO-config-template={path}"]) == 0
    listed = {entry["IOName"]: entry["Precision"] for entry in yaml.safe_load(path.read_text())}
    names = [info.name for info in (*m.graph.input, *m.graph.output) if info.name != "input_ids"]
    assert listed == dict.fromkeys(names, "float")
    flags = ("-onnx-define-symbol=batch,1", "-onnx-define-symbol=ctx_len,4")
    assert compile_onnx(m, *flags, custom_io=path.read_text()).code == 0


# Other flags with a meaning


def partitions(path: Path, devices: int, cores: int) -> str:
    entry = {"name": "Partition0", "devices": [{"deviceId": i, "numCores": cores} for i in range(devices)]}
    connections = [{"devices": list(range(devices)), "type": "p2p"}]
    path.write_text(json.dumps({"connections": connections, "partitions": [entry]}))
    return f"-mdp-load-partition-config={path}"


def test_partitions_give_the_number_of_devices(tmp_path, make_linear, compile_onnx):
    compiled = compile_onnx(make_linear(2), partitions(tmp_path / "mdp.json", 4, 8), "-aic-num-cores=16")
    header = qpc.read(compiled.directory).header
    assert (header["num_devices"], header["num_cores"]) == (4, 8)


@pytest.mark.parametrize("text", ["{", "[]", '{"partitions": []}', '{"partitions": [{"devices": [{"deviceId": 0}]}]}'])
def test_bad_partitions_are_refused(text, tmp_path, make_linear, compile_onnx):
    (tmp_path / "mdp.json").write_text(text)
    refused(compile_onnx(make_linear(2), f"-mdp-load-partition-config={tmp_path / 'mdp.json'}"), "mdp.json")


def test_partitions_with_too_many_cores(tmp_path, make_linear, compile_onnx):
    refused(compile_onnx(make_linear(2), partitions(tmp_path / "mdp.json", 2, 17)), "16 NSPs")


def test_supported_operators_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert qaic_compile.main(["-operators-supported=onnx"]) == 0
    names = Path("OnnxSupportedOperators.txt").read_text().split()
    assert {"MatMul", "Gelu", "ScatterND"} <= set(names)
    # RMSNormalization came with opset 23, Upsample went with opset 10.
    assert not {"RMSNormalization", "Upsample"} & set(names)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("-mos=0", "from 1 to 16"),
        ("-ols=many", "from 1 to 16"),
        ("-allocator-dealloc-delay=11", "from 0 to 10"),
        ("-vtcm-working-set-limit-ratio=1.5", "from 0 to 1"),
        ("-aic-profiling-type=all", "stats, trace, latency"),
        ("-quantization-calibration=Best", "KLMinimizationV2"),
        ("-operators-supported=caffe", "use onnx"),
    ],
)
def test_values_are_checked(flag, text, make_linear, compile_onnx):
    refused(compile_onnx(make_linear(2), flag), text)


@pytest.mark.parametrize("flag", ["-convert-to-quantize", "-json-input-file=x", "-load-profile=y"])
def test_missed_flags_are_warnings(flag, make_linear, compile_onnx):
    compiled = compile_onnx(make_linear(2), flag)
    assert compiled.code == 0
    assert f"warning: option {flag} has no effect here" in compiled.err


@pytest.mark.numeric
def test_weights_of_four_bits(make_model, compile_onnx, client):
    """MatMulNBits, as AWQ and GPTQ checkpoints are exported, against the dequantized product."""
    rng = np.random.default_rng(0)
    levels, scales = rng.integers(0, 16, (8, 32)), rng.uniform(0.01, 0.1, 8).astype(np.float16).astype(np.float32)
    packed = (levels[:, 0::2] | levels[:, 1::2] << 4).astype(np.uint8).reshape(8, 1, 16)
    attributes = {"K": 32, "N": 8, "bits": 4, "block_size": 32}
    nodes = [
        node("MatMulNBits", ["x", "q", "s"], ["h"], domain="com.microsoft", **attributes),
        node("Neg", ["h"], ["y"]),
    ]
    m = make_model(nodes, {"x": (F, ["n", 32])}, {"y": (F, ["n", 8])}, {"q": packed, "s": scales})
    x = rng.normal(size=(2, 32)).astype(np.float16).astype(np.float32)
    actual = client(compile_onnx(m, "-convert-to-fp16", specs=[{"n": "2"}]).directory).run(x=x)["y"]
    expected = -(x @ ((levels - 8) * scales[:, None]).T)
    assert np.array_equal(actual, actual.astype(np.float16))
    close(actual, expected, rtol=2e-3, atol=2e-3)
