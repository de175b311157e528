# SPDX-License-Identifier: Apache-2.0
"""A square weight that a product reads the other way is told from one in another layout."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from qeff_validate.explain.weights import compare_weights

GRAPHS: list[tuple[str, str, bool]] = [
    ("MatMul (x, w)", "", True),
    ("MatMul (x, t)", "t = Transpose <perm = [1, 0]> (w)", False),
    ("Gemm <transB = 1> (x, w)", "", False),
    ("Gemm (x, w)", "", True),
    ("Gemm <transB = 1> (x, t)", "t = Transpose <perm = [1, 0]> (w)", True),
    ("MatMul (w, x)", "", False),  # what reads it as its first input is no linear layer
]
"""A product of an input with the weight as torch has it, ``[out, in]``; True if it reads it the other way."""


@pytest.mark.parametrize(("product", "before", "wrong"), GRAPHS, ids=[f"{b} {p}" for p, b, _ in GRAPHS])
def test_square_weight_is_transposed_only_where_a_product_reads_it_so(product: str, before: str, wrong: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4, bias=False))
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (float[4, 4] x) => (float[4, 4] y) {{
        {before}
        y = {product}
    }}"""
    nodes = onnx.parser.parse_model(text).graph.node
    weight = module[0].weight.detach().numpy()
    found = compare_weights(module, {"w": weight}, nodes=nodes)
    assert [(item.initializer, item.sentence()) for item in found.findings] == [("w", "weight transposed")] * wrong
