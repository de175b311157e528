# SPDX-License-Identifier: Apache-2.0
"""Emulated integers, compared with what ONNX's reference evaluator makes of a file quantized by ONNX Runtime."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bounds import within
from onnx import numpy_helper, parser

from qeff_validate.config.case import Precision
from qeff_validate.config.file_precision import FilePrecision, IntegerFormat
from qeff_validate.models.emulation.integers import IntegerProducts, compressed_weights, quantized
from qeff_validate.models.emulation.microscaling import CompressedWeights

X = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) + 0.3
WEIGHT = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32) - 0.2


def product() -> torch.nn.Linear:
    layer = torch.nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(WEIGHT.T))
    return layer.eval()


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options", "numbers"),
    [
        ("QInt8", {}, IntegerFormat(8, activations=True)),
        ("QInt8", {"per_channel": True}, IntegerFormat(8, per_channel=True, activations=True)),
        ("QUInt8", {}, IntegerFormat(8, symmetric=False, activations=True)),
        ("QUInt8", {"reduce_range": True}, IntegerFormat(7, symmetric=False, activations=True)),
    ],
)
def test_dynamic_products_are_those_of_onnx_runtimes_quantizer(
    kind: str, options: dict[str, Any], numbers: IntegerFormat, tmp_path: Path
) -> None:
    from onnx.reference import ReferenceEvaluator
    from onnxruntime.quantization import QuantType, quantize_dynamic

    text = '<ir_version: 8, opset_import: ["" : 14]> g (float[3,16] x) => (float[3,8] y) { y = MatMul(x, w) }'
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    onnx.save(model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", weight_type=QuantType[kind], **options)
    (wanted,) = ReferenceEvaluator(str(tmp_path / "int8.onnx")).run(None, {"x": X})
    layer = product()
    with torch.no_grad(), IntegerProducts(layer, numbers):
        result = layer(torch.from_numpy(X)).numpy()
    exact = X @ WEIGHT
    assert np.linalg.norm(wanted - exact) > 1e-3 * np.linalg.norm(exact)
    within(np.linalg.norm(result - wanted) / np.linalg.norm(wanted), 1e-5)
    assert np.array_equal(layer.weight.detach().numpy(), WEIGHT.T)


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_products_of_two_activations_are_those_of_onnx_runtimes_quantizer(
    causal: bool, fused: bool, tmp_path: Path
) -> None:
    from onnx.reference import ReferenceEvaluator
    from onnxruntime.quantization import quantize_dynamic

    text = """<ir_version: 8, opset_import: ["" : 14]>
        g (float[1,2,5,8] q, float[1,2,5,8] k, float[1,2,5,8] v, float[5,5] m) => (float[1,2,5,8] y) {
            t = Transpose <perm = [0, 1, 3, 2]> (k)
            a = MatMul (q, t)
            s = Constant <value = float {0.35355339}> ()
            b = Mul (a, s)
            c = Add (b, m)
            p = Softmax <axis = -1> (c)
            y = MatMul (p, v)
        }"""
    onnx.save(parser.parse_model(text), tmp_path / "float.onnx")
    options = {"MatMulConstBOnly": False}
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", extra_options=options)
    names = ("q", "k", "v")
    states = dict(zip(names, np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8)).astype(np.float32), strict=True))
    mask = np.triu(np.full((5, 5), -1e9 if causal else 0, np.float32), 1)
    (wanted,) = ReferenceEvaluator(str(tmp_path / "int8.onnx")).run(None, {**states, "m": mask})
    (exact,) = ReferenceEvaluator(str(tmp_path / "float.onnx")).run(None, {**states, "m": mask})
    query, key, value = (torch.from_numpy(states[name]) for name in names)
    with torch.no_grad(), IntegerProducts(product(), IntegerFormat(activations=True, attention=True)):
        if fused:
            result = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        else:
            scores = query @ key.transpose(-2, -1) * 8**-0.5 + torch.from_numpy(mask)
            result = torch.matmul(scores.softmax(-1), value)
    assert np.linalg.norm(wanted - exact) > 1e-3 * np.linalg.norm(exact)
    within(np.linalg.norm(result.numpy() - wanted) / np.linalg.norm(wanted), 1e-5)


def test_weights_are_held_so_that_no_other_tensor_gets_their_memory_and_passes_for_one() -> None:
    layer = product()
    weight = weakref.ref(layer.weight)
    mode = IntegerProducts(layer, IntegerFormat(activations=True))
    del layer
    held = weight()
    assert held is not None
    assert mode.is_weight(held)


def test_query_that_sees_nothing_gives_zeros_as_in_torch_itself() -> None:
    query, key, value = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 1, 4, 3, 8))).float()
    key, value = key[:, :2], value[:, :2]  # heads in groups
    sees = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    attention, given = torch.nn.functional.scaled_dot_product_attention, {"attn_mask": sees, "enable_gqa": True}
    wanted = attention(query, key, value, **given)
    with torch.no_grad(), IntegerProducts(product(), IntegerFormat(activations=True, attention=True)):
        result = attention(query, key, value, **given)
    assert torch.equal(result[..., 1, :], torch.zeros(1, 4, 8))
    assert 0 < float((result - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.numeric
def test_blocks_share_a_scale_and_a_table_is_quantized_where_the_file_does() -> None:
    layer, table = product(), torch.nn.Embedding(4, 16)
    with torch.no_grad():
        table.weight.copy_(torch.from_numpy(X[[0, 1, 2, 0]]))
    model = torch.nn.ModuleList([layer, table])
    blocks = IntegerProducts(model, IntegerFormat(4, block=5))
    with torch.no_grad(), blocks:
        rows = layer(torch.eye(16)).numpy()
        assert torch.equal(table(torch.tensor([1])), table.weight[1:2])
    for start in range(0, 16, 5):
        part = WEIGHT[start : start + 5]
        scale = np.take_along_axis(part, np.abs(part).argmax(0)[None], 0) / -8
        within(np.abs(rows[start : start + 5] / scale - np.clip(np.round(part / scale), -8, 7)).max(), 1e-4)
    numbers = IntegerFormat(8, products=False, tables=True)
    with torch.no_grad(), IntegerProducts(model, numbers):
        scale = float(table.weight.abs().max()) / 127
        within(float((table(torch.tensor([1])) / scale - (table.weight[1] / scale).round()).abs().max()), 1e-4)
        assert torch.equal(layer(torch.eye(16)), layer.weight.T)


def test_zeros_stay_zeros_and_ends_of_a_range_are_kept() -> None:
    zeros = torch.zeros(2, 2)
    assert torch.equal(quantized(zeros, 8, symmetric=True), zeros)
    assert torch.equal(quantized(zeros, 8, symmetric=False), zeros)
    values = torch.tensor([-1.0, 0.0, 254.0])
    assert torch.equal(quantized(values, 8, symmetric=False), values)


def test_a_precision_says_how_its_weights_are_read() -> None:
    layer = product()
    assert not compressed_weights(layer, Precision())
    assert {type(mode) for mode in compressed_weights(layer, Precision(weights="mxfp6")).values()} == {
        CompressedWeights
    }
    file = FilePrecision(compute="fp32", weights="int8", integers=IntegerFormat())
    assert {type(mode) for mode in compressed_weights(layer, file).values()} == {IntegerProducts}
