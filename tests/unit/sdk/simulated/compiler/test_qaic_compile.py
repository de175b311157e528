# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.compiler import options, qaic_compile

F, F16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
node = helper.make_node
ROOT = Path(__file__).parents[5]


def subprocess_compile(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qeff_validate.sdk.simulated.compiler", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def refused(compiled, *texts: str) -> None:
    """A refusal: exit code 255, the reason on stderr, and nothing left behind."""
    assert compiled.code == 255
    for text in texts:
        assert text in compiled.err
    assert not compiled.directory.exists()


def shape_table(desc) -> list[list[list[int]]]:
    return [[list(shape.dims) for shape in entry.shapes] for entry in desc.allowed_shapes]


def test_success_as_a_process(tmp_path, make_linear):
    onnx.save(make_linear(2), tmp_path / "m.onnx")
    directory = tmp_path / "out" / "qpc"
    done = subprocess_compile(
        f"-m={tmp_path / 'm.onnx'}",
        "-aic-hw",
        "-aic-hw-version=ai100",
        "-convert-to-fp16",
        f"-aic-binary-dir={directory}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"Reading ONNX Model from {tmp_path / 'm.onnx'}",
        "Compile started ...............",
        "Compiling model with FP16 precision.",
        f"Generated binary is present at {directory}",
    ]
    assert [entry.name for entry in directory.iterdir()] == ["programqpc.bin"]


def test_failure_as_a_process(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    done = subprocess_compile(f"-m={tmp_path / 'm.onnx'}", "-aic-hw", f"-aic-binary-dir={tmp_path / 'qpc'}")
    assert done.returncode == 255
    assert "protobuf parse failure" in done.stderr
    assert not (tmp_path / "qpc").exists()


def test_the_package_loads_no_torch_and_nothing_of_the_library():
    code = (
        "import sys; from qeff_validate.sdk.simulated import tools;"
        "from qeff_validate.sdk.simulated.bindings import qaicrt;"
        "from qeff_validate.sdk.simulated.compiler import qaic_compile;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'pydantic')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("flag", ["-h", "-usage", "-version"])
def test_information_flags(flag, capsys):
    assert qaic_compile.main([flag]) == 0
    assert ("1.22.0.120" if flag == "-version" else "-aic-binary-dir") in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    [
        "-mxfp6-matmul",
        "-mos=2",
        "-ols=1",
        "-v",
        "-split-model-io",
    ],
)
def test_known_flags_give_no_warning(flag, make_linear, compile_onnx):
    compiled = compile_onnx(make_linear(2), flag)
    assert (compiled.code, compiled.err) == (0, "")


def test_unknown_flags_give_a_warning(make_linear, compile_onnx):
    compiled = compile_onnx(make_linear(2), "-brand-new=3")
    assert compiled.code == 0
    assert "warning" in compiled.err
    assert "-brand-new=3" in compiled.err


def test_every_flag_of_the_table_is_in_one_place():
    flags = options.WITHOUT_EFFECT | options._SWITCHES | options._VALUES
    assert len(flags) == len(options.WITHOUT_EFFECT) + len(options._SWITCHES) + len(options._VALUES)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("-compile-only", "unknown option -compile-only"),
        ("model.onnx", "Unexpected argument"),
        ("-aic-num-cores", "needs a value"),
        ("-aic-num-cores=0", "positive"),
        ("-aic-num-cores=17", "16 NSPs"),
        ("-aic-num-cores=many", "positive"),
        ("-batchsize=-1", "positive"),
        ("-convert-to-fp16=yes", "true or false"),
        ("-aic-hw=false", "-aic-hw is needed"),
        ("-aic-hw-version=ai300", "ai300 is not known to this compiler; use ai100 or ai200"),
        ("-aic-hw-version=2.0", "2.0"),
        ("-onnx-define-symbol=n", "<symbol>,<value>"),
        ("-onnx-define-symbol=n,x", "positive"),
        ("-network-specialization-config=/nowhere.json", "Failed to open file/nowhere.json"),
        ("-custom-IO-list-file=/nowhere.yaml", "Failed to open file/nowhere.yaml"),
        ("-m=/nowhere.onnx", "Failed to open file/nowhere.onnx"),
    ],
)
def test_bad_flags_are_refused(flag, text, make_linear, compile_onnx):
    refused(compile_onnx(make_linear(2), flag), text)


def test_model_and_directory_are_needed(capsys):
    assert qaic_compile.main(["-aic-hw", "-m=x.onnx"]) == 255
    assert qaic_compile.main(["-aic-hw", "-aic-binary-dir=x"]) == 255
    assert "-aic-binary-dir" in capsys.readouterr().err


def test_booleans_may_be_false(make_linear, compile_onnx):
    assert "FP16" not in compile_onnx(make_linear(2), "-convert-to-fp16=false").out
    assert "FP16" in compile_onnx(make_linear(2), "-convert-to-fp16=true", name="q2").out


def test_an_existing_program_is_not_overwritten(make_linear, compile_onnx):
    first = compile_onnx(make_linear(2))
    before = first.file.read_bytes()
    again = compile_onnx(make_linear(3))
    assert again.code == 255
    assert "already holds" in again.err
    assert first.file.read_bytes() == before


def test_an_existing_directory_survives_a_failure(tmp_path, make_linear, compile_onnx):
    (tmp_path / "qpc").mkdir()
    (tmp_path / "qpc" / "notes.txt").write_text("mine")
    assert compile_onnx(make_linear("n")).code == 255
    assert [entry.name for entry in (tmp_path / "qpc").iterdir()] == ["notes.txt"]
    assert compile_onnx(make_linear(2)).code == 0


def test_a_static_model_has_no_allowed_shapes(make_linear, compile_onnx):
    desc = compile_onnx(make_linear(3)).desc
    assert shape_table(desc) == []
    x, y = desc.selected_set.bindings
    assert (x.name, x.index, x.type, x.dir, list(x.dims), x.size) == (
        "x",
        0,
        aicapi.FLOAT_TYPE,
        0,
        [3, 32],
        384,
    )
    assert (y.name, y.index, y.type, y.dir, list(y.dims), y.size) == (
        "y",
        1,
        aicapi.FLOAT_TYPE,
        1,
        [3, 32],
        384,
    )
    assert x.is_valid
    assert not x.is_partial_buf_allowed
    assert desc.selected_set.name == "default"
    assert desc.io_sets[0] == desc.selected_set


FLAT = [{"batch_size": "2", "unused": "7"}, {"batch_size": 5}, {"batch_size": "1"}]
NAMED = [{"name": f"Graph_{i}", "symbols": entry} for i, entry in enumerate(FLAT)]


@pytest.mark.parametrize("specs", [FLAT, NAMED], ids=["flat", "named"])
def test_specializations(specs, make_linear, compile_onnx):
    compiled = compile_onnx(make_linear(), specs=specs)
    assert compiled.code == 0
    assert "unused" in compiled.err
    assert shape_table(compiled.desc) == [[[n, 32], [n, 32]] for n in (2, 5, 1)]
    assert [(list(b.dims), b.size) for b in compiled.desc.selected_set.bindings] == [([5, 32], 640)] * 2
    assert [shape.type for shape in compiled.desc.allowed_shapes[0].shapes] == [aicapi.FLOAT_TYPE] * 2


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ([{"batch_size": "2"}, {"batch_size": 2}], "No input that uniquely identifies specialization"),
        ([{"batch_size": "2", "k": "1"}, {"batch_size": "2", "k": "2"}], "No input that uniquely identifies"),
        ([{"batch_size": {"a": 1}}], "[json.exception.type_error.302] type must be string, but is object"),
        ([{"seq_len": "2"}], "symbol batch_size"),
        ([{"batch_size": "0"}], "positive"),
        ([{"batch_size": True}], "positive"),
        ([], "one at least"),
        (["x"], "list of objects"),
        ("{nonsense", "specializations"),
        ('{"other": []}', "specializations"),
        (
            [{"name": "A", "symbols": {"batch_size": "1"}}, {"name": "A", "symbols": {"batch_size": "2"}}],
            "not unique",
        ),
    ],
)
def test_bad_specializations_are_refused(specs, text, make_linear, compile_onnx):
    refused(compile_onnx(make_linear(), specs=specs), text)


def test_a_left_over_symbol_is_named_with_its_input(make_linear, compile_onnx):
    refused(compile_onnx(make_linear("rows")), "All dims must be static", "symbol rows", "'x'")
    refused(compile_onnx(make_linear(2, "cols"), "-batchsize=3"), "symbol cols", "'x'")


def test_symbols_and_batch_size_from_flags(make_linear, compile_onnx):
    defined = compile_onnx(make_linear("rows"), "-onnx-define-symbol=rows,4")
    assert list(defined.desc.selected_set.bindings[0].dims) == [4, 32]
    assert not defined.desc.allowed_shapes
    batch = compile_onnx(make_linear(None), "-batchsize=6", name="batch")
    assert [list(b.dims) for b in batch.desc.selected_set.bindings] == [[6, 32], [6, 32]]
    both = compile_onnx(make_linear("rows"), "-onnx-define-symbol=rows,4", specs=[{"rows": "7"}], name="both")
    assert shape_table(both.desc) == [[[7, 32], [7, 32]]]


def test_output_dims_are_inferred_per_specialization(make_model, compile_onnx):
    """The exporter's own symbol for an output, and a reshape whose shape is computed from the input's."""
    nodes = [
        node("Shape", ["x"], ["s"], start=0, end=1),
        node("Concat", ["s", "minus"], ["to"], axis=0),
        node("Reshape", ["x", "to"], ["y"]),
        node("Concat", ["x", "x"], ["z"], axis=1),
    ]
    m = make_model(
        nodes,
        {"x": (F, ["b", "n", 4])},
        {"y": (F, ["y_dim_0", "y_dim_1"]), "z": (F, ["b", "z_dim_1", 4])},
        {"minus": np.array([-1])},
    )
    compiled = compile_onnx(m, specs=[{"b": "2", "n": "3"}, {"b": "1", "n": "5"}])
    assert shape_table(compiled.desc) == [[[2, 3, 4], [2, 12], [2, 6, 4]], [[1, 5, 4], [1, 20], [1, 10, 4]]]


def test_recorded_shapes_of_an_example_do_not_mislead_inference(make_model, compile_onnx):
    nodes = [node("Neg", ["x"], ["h"]), node("Concat", ["h", "h"], ["y"], axis=0)]
    m = make_model(nodes, {"x": (F, ["n"])}, {"y": (F, ["m"])})
    m.graph.value_info.append(helper.make_tensor_value_info("h", F, [9]))
    assert shape_table(compile_onnx(m, specs=[{"n": "3"}]).desc) == [[[3], [6]]]


def test_data_dependent_output_dims_are_refused(make_model, compile_onnx):
    m = make_model([node("NonZero", ["x"], ["y"])], {"x": (F, [4])}, {"y": (I64, [1, "found"])})
    refused(compile_onnx(m), "All dims must be static", "'y'")


@pytest.mark.parametrize(
    ("element", "binding", "size"),
    [
        (F, 0, 4),
        (F16, 1, 2),
        (I64, 7, 8),
        (TensorProto.INT32, 6, 4),
        (TensorProto.INT8, 8, 1),
        (TensorProto.UINT8, 3, 1),
        (TensorProto.BOOL, 8, 1),
    ],
)
def test_binding_types(element, binding, size, make_model, compile_onnx):
    m = make_model([node("Identity", ["x"], ["y"])], {"x": (element, [5])}, {"y": (element, [5])})
    assert [(b.type, b.size) for b in compile_onnx(m).desc.selected_set.bindings] == [(binding, 5 * size)] * 2


@pytest.mark.parametrize("element", ["DOUBLE", "STRING"])
def test_unsupported_types_are_refused(element, make_model, compile_onnx):
    kind = TensorProto.DataType.Value(element)
    m = make_model([node("Identity", ["x"], ["y"])], {"x": (kind, [5])}, {"y": (kind, [5])})
    refused(compile_onnx(m), element.lower(), "'x'")


def test_custom_io(make_linear, compile_onnx, client):
    yaml = " - IOName: x\n   Precision: float16\n\n - IOName: y\n   Precision: float16\n"
    compiled = compile_onnx(make_linear(2), "-convert-to-fp16", custom_io=yaml)
    assert [b.type for b in compiled.desc.selected_set.bindings] == [aicapi.FLOAT_16_TYPE] * 2
    x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float16)
    actual = client(compiled.directory).run(x=x)["y"]
    plain = client(compile_onnx(make_linear(2), "-convert-to-fp16", name="plain").directory)
    assert actual.dtype == np.float16
    assert np.array_equal(actual, plain.run(x=x.astype(np.float32))["y"])


def test_custom_io_of_a_value_that_is_used_inside_too(make_model, compile_onnx, client):
    nodes = [node("Add", ["x", "x"], ["y"]), node("Mul", ["y", "x"], ["z"])]
    m = make_model(nodes, {"x": (F16, [4])}, {"y": (F16, [4]), "z": (F16, [4])})
    compiled = compile_onnx(m, custom_io="- {IOName: x, Precision: float}\n- {IOName: y, Precision: float}\n")
    actual = client(compiled.directory).run(x=np.full(4, 3, np.float32))
    assert actual["y"].dtype == np.float32
    assert actual["y"][0] == 6
    assert actual["z"].dtype == np.float16
    assert actual["z"][0] == 18


@pytest.mark.parametrize(
    ("yaml", "texts"),
    [
        ("- {IOName: q, Precision: float16}", ["q", "x, ids, y"]),
        ("- {IOName: x, Precision: mxint8}", ["mxint8", "'x'"]),
        ("- {IOName: ids, Precision: float16}", ["'ids'", "float"]),
        ("- {IOName: x}", ["Precision"]),
        ("IOName: x", ["not a list"]),
        ("- [", ["not a list"]),
    ],
)
def test_bad_custom_io_is_refused(yaml, texts, make_model, compile_onnx):
    m = make_model([node("Gather", ["x", "ids"], ["y"])], {"x": (F, [4]), "ids": (I64, [2])}, {"y": (F, [2])})
    refused(compile_onnx(m, custom_io=yaml), *texts)


@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, -1])
def test_truncated_models_are_refused(keep, tmp_path, make_linear, compile_onnx):
    data = make_linear(2).SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(compile_onnx(tmp_path / "cut.onnx"), "QAIC_ERROR: Error message")


def test_external_data(tmp_path, make_linear, compile_onnx, client):
    m = make_linear(2)
    x = np.eye(2, 32, dtype=np.float32)
    expected = x @ numpy_helper.to_array(m.graph.initializer[0]) + numpy_helper.to_array(m.graph.initializer[1])
    onnx.save(m, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    assert np.array_equal(client(compile_onnx(tmp_path / "m.onnx").directory).run(x=x)["y"], expected)
    (tmp_path / "w.data").write_bytes((tmp_path / "w.data").read_bytes()[:-1])
    refused(compile_onnx(tmp_path / "m.onnx", name="short"), "w.data", "does not fit")
    (tmp_path / "w.data").unlink()
    refused(compile_onnx(tmp_path / "m.onnx", name="gone"), "Failed to open file", "w.data", "'W'")


def test_external_data_outside_of_the_folder_is_refused(tmp_path, make_linear, compile_onnx):
    m = make_linear(2)
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.data").write_bytes(m.graph.initializer[0].raw_data)
    onnx.external_data_helper.set_external_data(m.graph.initializer[0], "../w.data")
    m.graph.initializer[0].ClearField("raw_data")
    (tmp_path / "inner" / "m.onnx").write_bytes(m.SerializeToString())
    refused(compile_onnx(tmp_path / "inner" / "m.onnx"), "../w.data", "leaves the model's folder")


def test_damaged_initializer_is_refused(make_linear, compile_onnx):
    m = make_linear(2)
    m.graph.initializer[0].raw_data = m.graph.initializer[0].raw_data[:-4]
    refused(compile_onnx(m), "'W'", "damaged")


def test_typed_initializer_fields(make_model, compile_onnx, client):
    m = make_model([node("Add", ["x", "W"], ["y"])], {"x": (F, [1])}, {"y": (F, [300])})
    m.graph.initializer.append(helper.make_tensor("W", F, [300], np.arange(300, dtype=np.float32)))
    assert not m.graph.initializer[0].raw_data
    actual = client(compile_onnx(m).directory).run(x=np.ones(1, np.float32))["y"]
    assert np.array_equal(actual, np.arange(300) + 1)


def test_importer_errors_name_the_operator(make_model, compile_onnx):
    m = make_model([node("Frobnicate", ["x"], ["y"])], {"x": (F, [2])}, {"y": (F, [2])})
    refused(
        compile_onnx(m),
        "[Operator-'Frobnicate', opset_version-18, ir_version-9]",
        "Unable to AddNodesToGraphFromModel",
    )
    m = make_model([node("Gelu", ["x"], ["y"])], {"x": (F, [2])}, {"y": (F, [2])})
    refused(compile_onnx(m), "Operator-'Gelu'")


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Add", ["x", "nowhere"], ["y"])],
        [node("Neg", ["x"], ["y"]), node("Neg", ["x"], ["y"])],
        [node("MatMul", ["x", "x", "x"], ["y"])],
    ],
    ids=["undefined", "twice", "arity"],
)
def test_checker_failures_are_refused(nodes, make_model, compile_onnx):
    refused(compile_onnx(make_model(nodes, {"x": (F, [2])}, {"y": (F, [2])})), "QAIC_ERROR: Error message")


def test_what_the_evaluator_can_not_open_is_refused(make_model, compile_onnx):
    m = make_model([node("Own", ["x"], ["y"], domain="my.ops")], {"x": (F, [2])}, {"y": (F, [2])},
                   opsets=[helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)])  # fmt: skip
    refused(compile_onnx(m), "QAIC_ERROR", "Own")


def test_too_new_opset_is_refused(make_model, compile_onnx):
    m = make_model([node("Neg", ["x"], ["y"])], {"x": (F, [2])}, {"y": (F, [2])}, opset=22)
    refused(compile_onnx(m), "opset 22", "21")


def test_local_functions_are_inlined(make_model, compile_onnx, client):
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.fn", 1)]
    body = [node("Mul", ["a", "b"], ["m"]), node("Mul", ["m", "m"], ["r"])]
    function = helper.make_function("my.fn", "Square", ["a", "b"], ["r"], body, opsets[:1])
    w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    m = make_model(
        [node("Square", ["x", "W"], ["y"], domain="my.fn")],
        {"x": (F, [32, 32])}, {"y": (F, [32, 32])}, {"W": w}, opsets=opsets, functions=[function],
    )  # fmt: skip
    x = np.full((32, 32), 0.3, np.float32)
    actual = client(compile_onnx(m, "-convert-to-fp16").directory).run(x=x)["y"]
    product = (x.astype(np.float16).astype(np.float32) * w.astype(np.float16).astype(np.float32)).astype(np.float16)
    expected = (product.astype(np.float32) ** 2).astype(np.float16).astype(np.float32)
    assert np.array_equal(actual, expected), "nodes inside of a function are rounded too"


def test_initializers_that_are_inputs_too_are_constants(make_linear, compile_onnx, client):
    m = make_linear(2)
    m.graph.input.append(helper.make_tensor_value_info("W", F, [32, 32]))
    m.ir_version = 3
    m.graph.input.append(helper.make_tensor_value_info("b", F, [32]))
    compiled = compile_onnx(m)
    assert [b.name for b in compiled.desc.selected_set.bindings] == ["x", "y"]
    assert np.isfinite(client(compiled.directory).run(x=np.ones((2, 32), np.float32))["y"]).all()


@pytest.mark.parametrize("what", ["output is input", "output is constant", "sparse"])
def test_unclear_borders_are_refused(what, make_model, compile_onnx):
    outputs = {
        "y": (F, [2]),
        {"output is input": "x", "output is constant": "c", "sparse": "z"}[what]: (F, [2]),
    }
    m = make_model(
        [node("Add", ["x", "c"], ["y"]), node("Neg", ["x"], ["z"])],
        {"x": (F, [2])},
        outputs,
        {"c": np.ones(2, np.float32)},
    )
    if what == "sparse":
        values = numpy_helper.from_array(np.ones(1, np.float32), "sp")
        m.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0])), [2])
        )
    assert compile_onnx(m).code == 255


def test_bindings_of_4_gib_are_refused(make_model, compile_onnx):
    m = make_model([node("Identity", ["x"], ["y"])], {"x": (F, [2**15, 2**15])}, {"y": (F, [2**15, 2**15])})
    refused(compile_onnx(m), "4 GiB", "'x'")
