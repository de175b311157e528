# SPDX-License-Identifier: Apache-2.0
"""The precision that a file computes in: read from hand-made graphs, and judged by it end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import qeff_validate as qv
from qeff_validate.config.case import Precision
from qeff_validate.config.file_precision import IntegerFormat
from qeff_validate.engine import Runner
from qeff_validate.mutation.mutant import mutants
from qeff_validate.prechecks.graph_precision import GraphPrecision, combined, graph_precision, measurable, precision_of

HEAD = '<ir_version: 8, opset_import: ["" : 21, "com.microsoft" : 1, "local" : 1]>'
F32 = "float[4,4] w = {" + ",".join("1" * 16) + "}"
F16 = F32.replace("float[", "float16[")
B16 = F32.replace("float[", "bfloat16[")
I8 = F32.replace("float[", "int8[")

GRAPHS = {
    "float32": (f"g (float[2,4] x) => (float[2,4] y) <{F32}> {{ y = MatMul(x, w) }}", ("fp32", None)),
    "float16 inside float32": (
        f"g (float[2,4] x) => (float[2,4] y) <{F16}> {{ a = Cast<to=10>(x) b = MatMul(a, w) y = Cast<to=1>(b) }}",
        ("fp16", None),
    ),
    "float16 throughout": (f"g (float16[2,4] x) => (float16[2,4] y) <{F16}> {{ y = Gemm(x, w) }}", ("fp16", None)),
    "float16 weights, widened": (
        f"g (float[2,4] x) => (float[2,4] y) <{F16}> {{ a = Cast<to=1>(w) b = Transpose(a) y = MatMul(x, b) }}",
        ("fp16", None),
    ),
    "bfloat16 weights, widened": (
        f"g (float[2,4] x) => (float[2,4] y) <{B16}> {{ a = Cast<to=1>(w) y = MatMul(x, a) }}", ("bf16", None),
    ),
    "values rounded to float16 and back": (
        f"g (float[2,4] x) => (float[2,4] y) <{F32}> {{ a = Cast<to=10>(x) b = Cast<to=1>(a) y = MatMul(b, w) }}",
        ("fp16", None),
    ),
    "a float16 mask that nothing multiplies": (
        f"g (float[2,4] x, float16[2,4] m) => (float[2,4] y, float16[2,4] n) <{F32}> {{ y = MatMul(x, w) n = Neg(m) }}",
        ("fp32", None),
    ),
    "float16 computed anew in float32": (
        f"g (float16[2,4] x) => (float[2,4] y) <{F32}> {{ a = Cast<to=1>(x) b = Exp(a) y = MatMul(b, w) }}",
        ("fp32", None),
    ),
    "one float16 product of three": (
        f"g (float[2,4] x) => (float[2,4] y) <{F32}> {{ a = MatMul(x, w) b = Cast<to=10>(a) c = Cast<to=10>(w)"
        " d = MatMul(b, c) e = Cast<to=1>(d) f = Exp(e) y = MatMul(f, w) }",
        ("fp32", None),
    ),
    "two float16 products of three": (
        f"g (float[2,4] x) => (float[2,4] y) <{F32}> {{ a = MatMul(x, w) b = Cast<to=10>(a) c = Cast<to=10>(w)"
        " d = MatMul(b, c) e = MatMul(d, c) y = Cast<to=1>(e) }",
        ("fp16", None),
    ),
    "int8 weights": (
        f"g (float[2,4] x) => (float[2,4] y) <{I8}, float s = {{0.1}}> {{ a = DequantizeLinear(w, s)"
        " y = MatMul(x, a) }",
        ("fp32", "int8"),
    ),
    "int8 weights beside float16": (
        f"g (float16[2,4] x) => (float16[2,4] y) <{I8}, float16 s = {{1}}> {{ a = DequantizeLinear(w, s)"
        " y = MatMul(x, a) }",
        ("fp16", "int8"),
    ),
    "int8 by scales of a whole batch": (
        f"g (float[2,4] x) => (float[2,4] y) <{I8}> {{ a, s, z = DynamicQuantizeLinear(x) b = MatMulInteger(a, w, z)"
        " c = Cast<to=1>(b) y = Mul(c, s) }",
        ("fp32", "int8"),
    ),
    "int32 biases alone": (
        f"g (float[2,4] x) => (float[2,4] y) <{F32}, int32[4] k = {{1,1,1,1}}, float s = {{0.1}}> {{ y0 = MatMul(x, w)"
        " a = DequantizeLinear(k, s) y = Add(y0, a) }",
        ("fp32", None),
    ),
    "4-bit blocks": (
        "g (float[2,32] x, uint8[4,1,16] w, float[4] s) => (float[2,4] y) {"
        " y = com.microsoft.MatMulNBits<K=32, N=4, bits=4, block_size=32>(x, w, s) }",
        ("fp32", "int4"),
    ),
    "8-bit blocks": (
        "g (float[2,32] x, uint8[4,1,32] w, float[4] s) => (float[2,4] y) {"
        " y = com.microsoft.MatMulNBits<K=32, N=4, bits=8, block_size=32>(x, w, s) }",
        ("fp32", "int8"),
    ),
    "inside a branch": (
        f"g (float[2,4] x, bool c) => (float[2,4] y) <{F32}, {F16.replace(' w', ' h')}> {{ y = If(c)"
        " <then_branch = t () => (float[2,4] p) { a = Cast<to=10>(x) b = MatMul(a, h) p = Cast<to=1>(b) },"
        " else_branch = e () => (float[2,4] q) { q = MatMul(x, w) }> }",
        ("fp16", None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_precision_is_that_of_what_is_multiplied(name: str) -> None:
    text, wanted = GRAPHS[name]
    precision = precision_of(parser.parse_model(f"{HEAD} {text}"))
    assert (precision.compute, precision.weights) == wanted
    assert bool(precision.where) == (wanted != ("fp32", None) or name == "one float16 product of three")


U8 = "uint8[4,4] w = {0,200,1,1, 1,1,1,1, 1,1,1,1, 1,1,1,1}"
SUMS = " a, t, z = DynamicQuantizeLinear(x) b = MatMulInteger(a, w, z) c = Cast<to=1>(b) u = Mul(t, s) y = Mul(c, u) }"
FORMATS = {
    "weights alone": (GRAPHS["int8 weights"][0], IntegerFormat(7)),
    "by channel, widened for the product": (
        f"g (float[2,4] x) => (float[2,4] y) <{U8}, float[4] s = {{1,1,1,1}}> {{ a = DequantizeLinear<axis=1>(w, s)"
        " y = MatMul(x, a) }",
        IntegerFormat(8, symmetric=False, per_channel=True),
    ),
    "dynamic": (
        f"g (float[2,4] x) => (float[2,4] y) <{U8}, float s = {{1}}> {{{SUMS}",
        IntegerFormat(8, symmetric=False, activations=True),
    ),
    "dynamic, by channel, with a table": (
        f"g (int64[2,4] i, float[2,4] x) => (float[2,4] y, float[2,4,4] e) <{U8}, float[4] s = {{1,1,1,1}},"
        f" float f = {{1}}> {{ r = Gather(w, i) e = DequantizeLinear(r, f) {SUMS}",
        IntegerFormat(8, symmetric=False, per_channel=True, activations=True, tables=True),
    ),
    "dynamic, in attention too": (
        f"g (float[2,4] x, float[4,4] v) => (float[2,4] y, float[2,4] o) <{U8}, float s = {{1}}> {{"
        f" d, e, f = DynamicQuantizeLinear(v) p = MatMulInteger(a, d, z, f) o = Cast<to=1>(p) {SUMS}",
        IntegerFormat(8, symmetric=False, activations=True, attention=True),
    ),
    "dynamic, in one attention of two": (
        f"g (float[2,4] x, float[4,4] v) => (float[2,4] y, float[2,4] o, float[2,4] n) <{U8}, float s = {{1}}> {{"
        f" d, e, f = DynamicQuantizeLinear(v) p = MatMulInteger(a, d, z, f) o = Cast<to=1>(p) n = MatMul(x, v) {SUMS}",
        None,
    ),
    "blocks": (GRAPHS["4-bit blocks"][0], IntegerFormat(4, block=32)),
    "blocks with zero points": (
        GRAPHS["4-bit blocks"][0].replace("(x, w, s)", "(x, w, s, x)"), IntegerFormat(4, symmetric=False, block=32),
    ),
    "scales that somebody has calibrated": (
        f"g (float[2,4] x) => (float[2,4] y) <{I8}, float s = {{1}}, int8 z = {{0}}> {{ q = QuantizeLinear(x, s, z)"
        " d = DequantizeLinear(q, s, z) a = DequantizeLinear(w, s) y = MatMul(d, a) }",
        None,
    ),
    "two formats": (
        f"g (float[2,4] x) => (float[2,4] y) <{U8}, {I8.replace(' w', ' v')}, float s = {{1}}> {{"
        " a = DequantizeLinear(w, s) b = DequantizeLinear(v, s) c = MatMul(x, a) y = MatMul(c, b) }",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_format_of_the_integers_is_that_of_all_weights(name: str) -> None:
    text, wanted = FORMATS[name]
    assert precision_of(parser.parse_model(f"{HEAD} {text}")).integers == wanted


def test_a_file_is_read_without_its_weights_and_through_local_functions(tmp_path: Path) -> None:
    function = '<opset_import: ["" : 21], domain: "local"> f (a) => (c) { b = Cast<to=10>(a) c = MatMul(b, b) }'
    model = parser.parse_model(
        f"{HEAD} g (float[2,4] x) => (float[2,4] y) {{ a = local.f(x) y = Cast<to=1>(a) }} {function}"
    )
    onnx.save(model, str(tmp_path / "functions.onnx"))
    assert graph_precision(tmp_path / "functions.onnx").compute == "fp16"
    whole = parser.parse_model(f"{HEAD} g (float[2,4] x) => (float[2,4] y) {{ a = Cast<to=10>(x) y = Cast<to=1>(a) }}")
    del whole.graph.node[:]
    whole.graph.node.append(helper.make_node("MatMul", ["x16", "w"], ["y"]))
    whole.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16))
    whole.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float16), "w"))
    onnx.save(whole, str(tmp_path / "w.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    assert graph_precision(tmp_path / "w.onnx") == GraphPrecision("fp16", None, "1 of 1 products in float16")


def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    assert graph_precision(tmp_path / "bad.onnx") == graph_precision(tmp_path / "none.onnx") == GraphPrecision()


@pytest.mark.parametrize(
    ("asked", "file", "profile", "measured"),
    [
        (Precision(compute="fp32"), GraphPrecision(), "fp32", True),
        (Precision(compute="fp32"), GraphPrecision("fp16"), "fp16", True),
        (Precision(compute="fp16"), GraphPrecision("fp16"), "fp16", True),
        (Precision(compute="fp16"), GraphPrecision("bf16"), "bf16", True),
        (Precision(compute="fp32"), GraphPrecision("fp32", "int8"), "fp32+int8", False),
        (Precision(compute="fp32"), GraphPrecision("fp32", "int8", "", IntegerFormat()), "fp32+int8", True),
        (Precision(weights="mxfp6"), GraphPrecision("fp32", "int8", "", IntegerFormat()), "fp16+mxfp6+int8", False),
        (Precision(compute="fp16", weights="mxfp6"), GraphPrecision("fp16"), "fp16+mxfp6", True),
        (Precision(compute="fp16", kv="mxint8"), GraphPrecision("fp32", "int4"), "fp16+int4+mxint8", False),
    ],
)
def test_a_runtime_and_a_file_give_the_coarser_precision(
    asked: Precision, file: GraphPrecision, profile: str, measured: bool
) -> None:
    precision = combined(asked, file)
    assert (precision.profile, measurable(precision)) == (profile, measured)


# --- end to end --------------------------------------------------------------------------------------

TEXTS = ["a river begins in the hills", "rain", "small streams that nobody named", "one two three four five"]


def case(onnx_file: str | None = None, **more: Any) -> qv.Case:
    return qv.Case(
        name="small", source="random:bert", options={"pooling": "mean", "seq_len": [16]}, inputs={"texts": TEXTS},
        exporter="torchscript", artifacts={"onnx": onnx_file}, **more,
    )  # fmt: skip


def to_half(source: str, target: str, *, io: bool) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=io), target)


def to_int8(source: str, target: str) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.fixture(scope="module")
def exported(runner: Runner) -> str:
    return str(runner.pipeline(case()).onnx().path)


@pytest.mark.parametrize("io", [True, False], ids=["float32 outside", "float16 outputs"])
@pytest.mark.parametrize("runtime", ["ort", "sim"])
def test_a_float16_file_passes_by_its_own_bounds_and_a_fault_in_it_fails(
    runner: Runner, exported: str, tmp_path: Path, io: bool, runtime: str
) -> None:
    path = str(tmp_path / "half.onnx")
    to_half(exported, path, io=io)
    result = runner.result(case(path), runtime)
    assert (result.status, result.precision) == ("pass", "fp16"), result.reason
    (finding,) = (text for text in result.findings if "float16" in text)
    assert finding.startswith("the file computes in float16 (")
    assert finding.endswith("the bounds are those of fp16")
    spoilt = onnx.load(path)
    weight = next(tensor for tensor in spoilt.graph.initializer if len(tensor.dims) == 2 and "weight" in tensor.name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.3), weight.name))
    wrong = runner.result(case(save(spoilt, str(tmp_path / "spoilt.onnx"))), runtime)
    assert (wrong.status, wrong.precision) == ("fail", "fp16")


def test_an_int8_file_is_judged_by_the_noise_of_int8_and_a_case_may_give_bounds(
    runner: Runner, exported: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "int8.onnx")
    to_int8(exported, path)
    result = runner.result(case(path), "ort")
    assert result.precision == "fp32+int8"
    assert {metric.bound.source for metric in result.metrics if metric.bound} == {"floor", "exact"}, result.reason
    assert any(text.startswith("the file computes in int8 (") for text in result.findings)
    wide = {"rel_l2": 0.2, "cosine": 0.02, "norm_ratio": 0.1, "max_abs_rms": 1.0, "neighbour_order": 0.5, "why": "int8"}
    assert runner.result(case(path, tolerance={"ort": wide}), "ort").status == "pass"
    narrow = {**wide, "rel_l2": 1e-5}
    failed = runner.result(case(path, tolerance={"ort": narrow}), "ort")
    assert failed.status == "fail"
    assert "output.rel_l2" in failed.reason


def test_integer_sums_beyond_fp16_are_scaled_in_float32_unless_a_case_brings_another_list_of_nodes(
    runner: Runner, exported: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "int8.onnx")
    to_int8(exported, path)
    result = runner.result(case(path), "sim")
    assert (result.status, result.precision) == ("pass", "fp16+int8"), result.reason
    (tmp_path / "nodes.yaml").write_text("FP32NodeInstanceNames:\n  - output\n", encoding="utf-8")
    flags = {"flags": {"node-precision-info": str(tmp_path / "nodes.yaml")}}
    overflown = runner.result(case(path, compile=flags), "sim")
    assert (overflown.status, overflown.precision) == ("fail", "fp16+int8")
    assert "NaN or infinite in 4 of 5 rows" in overflown.reason
    assert "the file computes in int8 (" in overflown.reason


def test_one_float16_product_in_a_float32_file_is_a_fault_that_is_named(
    runner: Runner, exported: str, tmp_path: Path
) -> None:
    mutant = next(mutant for mutant in mutants("embedding") if mutant.name == "graph: one product of fp16 operands")
    model = onnx.load(exported)
    mutant.change(model)
    result = runner.result(case(save(model, str(tmp_path / "one.onnx"))), "ort")
    assert (result.status, result.precision) == ("fail", "fp32")
    assert "the file computes in float32 (1 of " in result.reason
    assert "products in float16); the bounds are those of fp32" in result.reason


def test_a_float32_file_has_no_finding(runner: Runner, exported: str) -> None:
    result = runner.result(case(exported, tolerance="table"), "ort")
    assert (result.status, result.precision, result.findings) == ("pass", "fp32", ())


def save(model: onnx.ModelProto, path: str) -> str:
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"], ids=str)
def test_weights_alone_in_half_precision_are_judged_by_it(
    runner: Runner, exported: str, tmp_path: Path, dtype: Any
) -> None:
    model = onnx.load(exported)
    kind = TensorProto.FLOAT16 if dtype is np.float16 else TensorProto.BFLOAT16
    for tensor in list(model.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
            values = numpy_helper.to_array(tensor)
            half = helper.make_tensor(f"{tensor.name}_half", kind, tensor.dims, values.ravel().tolist())
            model.graph.initializer.append(half)
            model.graph.node.insert(0, helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
            model.graph.initializer.remove(tensor)
    result = runner.result(case(save(model, str(tmp_path / "w.onnx"))), "ort")
    assert (result.status, result.precision) == ("pass", "fp16" if dtype is np.float16 else "bf16"), result.reason
