# SPDX-License-Identifier: Apache-2.0
"""A part of a graph with the rounding that was asked for: what its nodes would give in fp16, by ONNX Runtime.

Shares no code with a compiler or the simulator. A node in fp16 reads rounded values, and its outputs are rounded;
weights that such a node reads are clipped and rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper, shape_inference

from qeff_validate.builders.compiler_inputs import NODE_PRECISION, flag_name, read_graph
from qeff_validate.config.case import Case
from qeff_validate.explain.range_audit import FP16_MAX


def rounds(case: Case, path: Path) -> Callable[[Any], bool]:
    """Return the function that says whether a case asks for a node in fp16 (card-contract §6.4).

    Args:
        case: with its precision and compiler flags.
        path: of the graph.
    """
    flags = {flag_name(key): str(value) for key, value in case.compile.flags.items()}
    half = case.precision.compute == "fp16"
    if NODE_PRECISION in flags:
        with open(flags[NODE_PRECISION], encoding="utf-8") as file:
            lists = yaml.safe_load(file) or {}
    else:
        lists = {"FP32NodeInstanceNames": read_graph(path).float32_nodes}
    whole_names, half_names = (set(map(str, lists.get(f"{kind}NodeInstanceNames") or ())) for kind in ("FP32", "FP16"))
    whole_types = set(flags.get("keep-original-precision-for-nodes", "").split(","))
    half_types = set(flags.get("execute-nodes-in-fp16", "").split(","))

    def in_fp16(node: Any) -> bool:
        if node.output[0] in whole_names or node.op_type in whole_types:
            return False
        return half or node.output[0] in half_names or node.op_type in half_types

    return in_fp16


def rounded_block(model: Any, in_fp16: Callable[[Any], bool]) -> Any:
    """Return a model whose nodes give fp16 values, as float32.

    Args:
        model: ModelProto with fixed shapes, and its weights inside.
        in_fp16: says whether a node does.
    """
    inferred = shape_inference.infer_shapes(model).graph
    known = (*inferred.value_info, *inferred.output, *inferred.input)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes = list(made.graph.node)
    del made.graph.node[:]
    read = {name for node in nodes if in_fp16(node) for name in node.input}
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in read:
            tensor.CopyFrom(numpy_helper.from_array(_rounded(numpy_helper.to_array(tensor)), tensor.name))
    exact = {value.name for value in made.graph.input} & floats
    exact |= {name for node in nodes if not in_fp16(node) for name in node.output if name in floats}
    renamed = {name: f"{name}/rounded" for name in sorted(exact & read)}
    for value in made.graph.input:
        if value.name in renamed:
            made.graph.node.extend(_casts(value.name, renamed[value.name]))
    for node in nodes:
        half = in_fp16(node)
        if half:
            node.input[:] = [renamed.get(name, name) for name in node.input]
        outputs = [name for name in node.output if name in floats]
        if half:
            node.output[:] = [f"{name}/exact" if name in floats else name for name in node.output]
        made.graph.node.append(node)
        for name in outputs:
            if half:
                made.graph.node.extend(_casts(f"{name}/exact", name))
            elif name in renamed:
                made.graph.node.extend(_casts(name, renamed[name]))
    return made


def _casts(source: str, target: str) -> list[Any]:
    half = f"{target}/half"
    return [
        helper.make_node("Cast", [source], [half], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [half], [target], to=TensorProto.FLOAT),
    ]


def _rounded(values: Any) -> Any:
    return np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16).astype(np.float32)
