# SPDX-License-Identifier: Apache-2.0
"""Computes the values that shapes alone decide, where the shape inference of onnx leaves dims open.

It follows the shapes of a few operators only: the number of rows that a Range takes from the shape of an input, say, is
open to it, and so is all that comes after.
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
"""Elements of a value that is computed here: positions and shapes are far smaller, weights are larger."""
_Shapes = Mapping[str, tuple[int | None, ...]]
_Values = dict[str, np.ndarray[Any, Any]]


def fold(model: Any, shapes: _Shapes) -> bool:
    """Replaces nodes by their values if only constants and shapes go into them; in place.

    Args:
        model: ModelProto.
        shapes: As far as they are known, of values by name.

    Returns:
        Whether there was any such node.
    """
    graph, opset = model.graph, opset_of(model)
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
    results = {info.name for info in graph.output}
    left = []
    for node in graph.node:
        found = None if results.intersection(node.output) else _value(node, values, shapes, opset)
        if found is None:
            left.append(node)
            continue
        values.update(found)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in found.items())
    folded = len(left) < len(graph.node)
    if folded:
        del graph.node[:]
        graph.node.extend(left)
    return folded


def _is_small(tensor: Any) -> bool:
    return bool(tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= LARGEST)


def _value(node: Any, values: _Values, shapes: _Shapes, opset: int) -> _Values | None:
    if node.domain not in STANDARD:
        return None
    if node.op_type in ("Shape", "Size"):
        dims = shapes.get(node.input[0], (None,))
        if None in dims:
            return None
        # what is asked for are the dims; one element stands for all
        feeds = {node.input[0]: np.broadcast_to(np.float32(0), [dim for dim in dims if dim is not None])}
    elif computed_once(node, values.keys()) and _constant_is_small(node):
        feeds = {name: values[name] for name in node.input if name}
    else:
        return None
    found = _evaluate(node, feeds, opset)
    return None if found is None or any(value.size > LARGEST for value in found.values()) else found


def _constant_is_small(node: Any) -> bool:
    return all(_is_small(attribute.t) for attribute in node.attribute if attribute.HasField("t"))


def _evaluate(node: Any, feeds: _Values, opset: int) -> _Values | None:
    from onnx.reference import ReferenceEvaluator  # loads every operator, and few models need it

    names = [name for name in node.output if name]
    try:
        inputs = [_info(name, value) for name, value in feeds.items()]
        graph = helper.make_graph([node], "node", inputs, [helper.make_empty_tensor_value_info(n) for n in names])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        return dict(zip(names, map(np.asarray, ReferenceEvaluator(model).run(None, feeds)), strict=True))
    except Exception:  # it has no base class for its errors; what it cannot compute stays open
        return None


def _info(name: str, value: np.ndarray[Any, Any]) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
