# SPDX-License-Identifier: Apache-2.0
"""Folds values that depend on shapes alone, where the shape inference of onnx leaves dims unknown.

Shape inference propagates values through a few operators only. The length of a Range whose limit comes from the shape
of an input, for example, is unknown to it, and so are the dims of everything after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ..graph import STANDARD, opset_of
from .static_shapes import computed_once

LARGEST = 2**16
"""The most elements of a folded value: positions and shapes are far smaller, weights are larger."""
_Shapes = Mapping[str, tuple[int | None, ...]]
_Values = dict[str, np.ndarray[Any, Any]]


def fold(model: Any, shapes: _Shapes) -> bool:
    """Replace nodes whose inputs are constants or shapes by their values, in place.

    Args:
        model: ModelProto.
        shapes: shapes of values by name; None stands for an unknown dim.

    Returns:
        True if a node was replaced.
    """
    graph, opset = model.graph, opset_of(model)
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
    results = {info.name for info in graph.output}
    remaining = []
    for node in graph.node:
        constants = None if results.intersection(node.output) else _folded(node, values, shapes, opset)
        if constants is None:
            remaining.append(node)
            continue
        values.update(constants)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    folded = len(remaining) < len(graph.node)
    if folded:
        del graph.node[:]
        graph.node.extend(remaining)
    return folded


def _is_small(tensor: Any) -> bool:
    return bool(tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= LARGEST)


def _folded(node: Any, values: _Values, shapes: _Shapes, opset: int) -> _Values | None:
    if node.domain not in STANDARD:
        return None
    if node.op_type in ("Shape", "Size"):
        dims = shapes.get(node.input[0], (None,))
        if None in dims:
            return None
        # only the dims matter, so one element is broadcast
        feeds = {node.input[0]: np.broadcast_to(np.float32(0), [dim for dim in dims if dim is not None])}
    elif computed_once(node, values.keys()) and _constant_is_small(node):
        feeds = {name: values[name] for name in node.input if name}
    else:
        return None
    outputs = _evaluate(node, feeds, opset)
    return None if outputs is None or any(value.size > LARGEST for value in outputs.values()) else outputs


def _constant_is_small(node: Any) -> bool:
    return all(_is_small(attribute.t) for attribute in node.attribute if attribute.HasField("t"))


def _evaluate(node: Any, feeds: _Values, opset: int) -> _Values | None:
    from onnx.reference import (
        ReferenceEvaluator,
    )  # imported here because it loads every operator, and few models need it

    names = [name for name in node.output if name]
    try:
        inputs = [_info(name, value) for name, value in feeds.items()]
        graph = helper.make_graph([node], "node", inputs, [helper.make_empty_tensor_value_info(n) for n in names])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        return dict(zip(names, map(np.asarray, ReferenceEvaluator(model).run(None, feeds)), strict=True))
    except Exception:  # its errors have no base class; such a value stays unknown
        return None


def _info(name: str, value: np.ndarray[Any, Any]) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
