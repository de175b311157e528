# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bounds import close
from onnx import parser
from torch import Tensor
from torch.overrides import TorchFunctionMode

import qeff_validate as qv
from qeff_validate.builders.export_onnx import export_onnx
from qeff_validate.errors import RunError
from qeff_validate.selftest.float64_graph import Float64Session, float64_graph

EXACT = 2.0**-20
"""An epsilon that float32 holds as it is."""


class Doubled(TorchFunctionMode):
    """While it is entered, what torch is told to compute in float32 it computes in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("source", "config", "pooling"),
    [
        ("bert", {"hidden_act": "relu", "layer_norm_eps": EXACT}, "cls"),
        ("llama", {"rms_norm_eps": EXACT}, "last"),
    ],
)
def test_a_graph_in_float64_is_the_model_in_float64(
    source: str, config: dict[str, Any], pooling: str, tmp_path: Path
) -> None:
    """Where all constants are exact in float32, there is nothing else to tell them apart."""
    case = qv.Case(name="exact", source=f"random:{source}", config=config, options={"pooling": pooling})
    model = qv.model(case)
    module, examples = model.module()
    export_onnx(module, examples, model.graph, tmp_path, "torchscript")
    feeds = {
        "input_ids": np.arange(3, 27).reshape(3, 8),
        "attention_mask": (np.arange(8) < [[8], [5], [1]]).astype(np.int64),
    }
    with torch.inference_mode(), Doubled():
        wanted = module.double()(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    assert wanted.dtype == torch.float64
    outputs = Float64Session(onnx.load(str(tmp_path / "model.onnx"))).run(feeds)["output"]
    close(outputs, wanted.numpy(), rtol=0, atol=1e-12 * float(wanted.abs().max()))


def graph(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> g {text}')


@pytest.mark.numeric
def test_everything_in_float32_is_widened_and_nothing_else() -> None:
    model = graph("""(float[n] x, bool chosen) => (float[n] y) <float third = {0.333333333}, float[1] s> {
        a = Constant <value_float = 0.1> ()  b = Constant <value = float[1] {0.2}> ()
        c = Constant <value_floats = [0.3]> ()  n = Constant <value_ints = [2]> ()
        many = Cast <to = 1> (n)  half = Cast <to = 10> (x)  again = Cast <to = 1> (half)
        kept = If (chosen) <
            then_branch = g1 () => (float[n] p) { f = Constant <value_float = 0.7> ()  p = Add (again, f) },
            else_branch = g2 () => (float[n] q) { q = Identity (again) }
        >
        s = Add (a, b)  t = Add (s, c)  u = Add (t, third)  v = Mul (u, many)  y = Add (v, kept) }""")
    before = model.SerializeToString()
    x = np.array([1 / 3, 5.0], np.float32)
    constants = sum(float(np.float32(number)) for number in (0.1, 0.2, 0.3, 0.333333333))
    wanted = 2 * constants + x.astype(np.float16).astype(np.float64) + float(np.float32(0.7))
    outputs = Float64Session(model).run({"x": x, "chosen": np.array(True)})["y"]
    assert outputs.dtype == np.float64
    close(outputs, wanted, rtol=1e-14)
    assert model.SerializeToString() == before
    assert len(model.graph.value_info) == 1
    wide = float64_graph(model)
    onnx.checker.check_model(wide, full_check=True)
    assert wide.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE


@pytest.mark.numeric
def test_the_error_function_is_not_rounded_to_float32() -> None:
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    outputs = Float64Session(graph("(float[n] x) => (float[n] y) { y = Erf (x) }")).run({"x": x})["y"]
    close(outputs, torch.erf(torch.from_numpy(x).double()).numpy(), rtol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_elements_are_gathered_as_onnx_runtime_does(axis: int) -> None:
    model = graph(f"(float[3, 5] x, int64[a, b] i) => (float[a, b] y) {{ y = GatherElements <axis = {axis}> (x, i) }}")
    feeds = {"x": np.arange(15, dtype=np.float32).reshape(3, 5), "i": np.array([[2, 0, -1], [1, 1, 0]])}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(Float64Session(model).run(feeds)["y"], session.run(None, feeds)[0])


def test_a_whole_number_that_constants_miss_in_float32_is_not_cut() -> None:
    """T5's buckets: the logarithm of a power of two by the rounded logarithm of another."""
    model = graph("""(float[n] x) => (int64[n] y) <float base = {2.7725887}, float eight = {8}> {
        l = Log (x)  d = Div (l, base)  m = Mul (d, eight)  y = Cast <to = 7> (m) }""")
    outputs = Float64Session(model).run({"x": np.array([2, 4, 8, 15.9], np.float32)})["y"]
    np.testing.assert_array_equal(outputs, [2, 4, 6, 7])


def test_state_goes_on_in_float64_until_it_is_reset() -> None:
    model = graph("""(float[1] x, float[1] sum) => (float[1] y, float[1] sum_RetainedState)
    <float zero = {0}> { lost = IsNaN (sum)  kept = Where (lost, zero, sum)
        sum_RetainedState = Add (kept, x)  y = Identity (sum_RetainedState) }""")
    session, x = Float64Session(model), np.array([1e9], np.float32)
    session.run({"x": x})
    outputs = session.run({"x": np.array([1e-3], np.float32)}, fetch=["y"])
    assert set(outputs) == {"y"}
    assert outputs["y"][0] == 1e9 + float(np.float32(1e-3))
    session.reset()
    assert session.run({"x": x})["y"][0] == 1e9
    with pytest.raises(RunError, match="float64, wanted float32"):
        session.run({"x": np.array([1.0])})
