# SPDX-License-Identifier: Apache-2.0
"""A part of a graph rounded as its case asks for it; the oracle is numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qeff_validate.config.case import Case
from qeff_validate.explain.fp16_block import rounded_block, rounds

X = np.array([0.1, 1.1, 60000], np.float32)
K = np.float32(1 / 3)


def half(values: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)


def chain() -> Any:
    """Return y = (x * k + x) * k."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["b"]),
        helper.make_node("Mul", ["b", "k"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    made = helper.make_graph(nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(K, "k")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


ALL = half(half(half(half(X) * half(K)) + half(X)) * half(K))
ADD = half(half(X * K) + half(X)) * K
MUL = half(half(half(half(X) * half(K)) + X) * half(K))
"""The sum in float32 reads a rounded product and the input as it is, and its reader rounds it."""


@pytest.mark.parametrize(
    ("precision", "flags", "lists", "expected"),
    [
        ("fp16", {}, None, ALL),
        ("fp32", {"execute-nodes-in-fp16": "Add"}, None, ADD),
        ("fp32", {}, "FP16NodeInstanceNames: [b]", ADD),
        ("fp32", {}, "FP32NodeInstanceNames: [b]", (X * K + X) * K),
        ("fp16", {"keep-original-precision-for-nodes": "Add"}, None, MUL),
        ("fp16", {}, "FP32NodeInstanceNames: [b]", MUL),
    ],
)
def test_only_the_nodes_that_were_asked_for_are_rounded(
    precision: str, flags: dict[str, Any], lists: str | None, expected: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(), str(path))
    if lists is not None:
        (tmp_path / "lists.yaml").write_text(lists)
        flags = {**flags, "node_precision_info": str(tmp_path / "lists.yaml")}
    case = Case(name="c", source="random:bert", precision={"compute": precision}, compile={"flags": flags})
    made = rounded_block(onnx.load(str(path)), rounds(case, path))
    onnx.checker.check_model(made, full_check=True)
    with np.errstate(over="ignore"):
        (actual,) = ReferenceEvaluator(made).run(None, {"x": X})
    assert np.array_equal(actual, expected)
