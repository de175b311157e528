# SPDX-License-Identifier: Apache-2.0
"""A square weight that a product reads the other way is told from one in another layout."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qeff_validate.explain.weight_layout import exchanged
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


def test_order_of_products_tells_which_weights_are_exchanged_without_those_that_no_graph_has() -> None:
    module = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("a", "b", "pooler", "c")})
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[4, 4] x) => (float[4, 4] y) {
        p = MatMul (x, v)
        q = MatMul (p, u)
        y = MatMul (q, w)
    }"""
    nodes = onnx.parser.parse_model(text).graph.node
    weights = dict(zip("uvw", (module[name].weight.detach().numpy().T for name in ("a", "b", "c")), strict=True))
    parameters = {"u": "a.weight", "v": "b.weight", "w": "c.weight"}
    names = ["a.weight", "b.weight", "c.weight"]
    called = ["a", "b", "pooler", "c"]
    assert exchanged(module, names, called, nodes, weights, parameters) == {"v": "a.weight", "u": "b.weight"}
    assert exchanged(module, names[:2], called, nodes, weights, parameters) == {}, "numbers of layers differ"
    assert exchanged(module, names, ["b", "a", "c"], nodes, weights, parameters) == {}, "they are in order"


def test_weights_below_the_least_of_fp16_are_right_as_it_or_as_zero_in_a_file_of_float16() -> None:
    module = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        module.weight[1, 2] = 1e-9
    rounded = module.weight.detach().numpy().astype(np.float16)
    least = rounded.copy()
    least[1, 2] = 2.0**-24
    for right in (rounded, least):
        assert compare_weights(module, {"w": right}, half=True).findings == []
    least[1, 3] *= 2
    (finding,) = compare_weights(module, {"w": least}, half=True).findings
    assert finding.text.startswith("element [1, 3] is")
    assert compare_weights(module, {"w": rounded}).findings[0].text == "rounded to fp16"
