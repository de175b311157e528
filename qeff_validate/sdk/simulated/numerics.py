# SPDX-License-Identifier: Apache-2.0
"""Half precision on a CPU: each value a node hands on is an fp16 value, computed in fp32 (qaic-contract §7).

The graph stays a float32 graph, so ONNX Runtime has a kernel for every node. Rounding is made explicit:

* **Constants** (initializers, Constant and ConstantOfShape values) are clipped to ±65504 and rounded when the
  model is compiled. Clipping turns mask constants such as -3.4e38, and infinities, into finite values, as
  QEfficient does before it compiles for a card. NaN stays NaN: a damaged weight must show.
* **Computed values** go through Cast(float16), Cast(float) after each node with a float32 output. This rounds
  to nearest-even, keeps subnormals, and overflows to infinity: nothing is clipped, so overflow shows too.
* **Moved values** (Reshape, Gather, Where, Max, …: each output element is an input element) need none.
* **Inputs** of type float are rounded at entry, by `boundary.py`. Outputs keep their type, with fp16 values.

Attributes (an epsilon, a Clip bound before opset 11) are not rounded. Values of other types, float64 and the
float16 of a model exported in half precision included, are left as they are.

What is not known of the card, and so may differ: the width of its accumulators (fp32 is assumed), whether it
flushes subnormals, which nodes it fuses and thus does not round between, its approximations of exp, erf, tanh
and the like, and the precision inside LayerNormalization and Softmax (fp32 inside, rounded once, is assumed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from .errors import CompileError
from .weights import Weight

FLOAT, FLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16)
FP16_MAX = 65504.0

# Each element of an output is an element of an input, so it is rounded already. Control flow hands on what
# its subgraphs, which are rounded themselves, hand out.
_MOVES = frozenset(
    {
        "Compress", "Concat", "ConcatFromSequence", "DepthToSpace", "Expand", "Flatten", "Gather",
        "GatherElements", "GatherND", "Identity", "If", "Loop", "Max", "MaxPool", "Min", "OneHot", "Pad",
        "Relu", "Reshape", "ReverseSequence", "Scan", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
        "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip


def clip_and_round(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns the fp16 values of a constant, still as float32: clipped to ±65504, NaN kept."""
    return np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16).astype(np.float32)


def round_weight(weight: Weight) -> Weight:
    """Returns the weight with its float32 values rounded on the way; others pass as they are."""
    if weight.data_type != FLOAT:
        return weight

    def chunks() -> Iterator[bytes]:
        for chunk in weight.chunks():
            yield clip_and_round(np.frombuffer(chunk, np.float32)).tobytes()

    return replace(weight, chunks=chunks)


def round_graph(graph: Any, types: Mapping[str, int]) -> None:
    """Makes a float32 graph round like fp16, in place and with its subgraphs; stubs of weights are left.

    Args:
        graph: GraphProto.
        types: Element type of every value that is visible in the graph, as `value_types` returns it.
    """
    for tensor in graph.initializer:
        _round_tensor(tensor)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for attribute in node.attribute:
            for subgraph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                round_graph(subgraph, value_types(subgraph, types))
        if node.op_type in ("Constant", "ConstantOfShape"):
            _round_constant(node)
            graph.node.append(node)
        elif node.op_type in _MOVES and node.domain in ("", "ai.onnx"):
            graph.node.append(node)
        else:
            graph.node.extend(_rounded(node, types))


def value_types(graph: Any, outer: Mapping[str, int] | None = None) -> dict[str, int]:
    """Returns the element type of every value of a graph on which shape inference has run."""
    types = dict(outer or {})
    types.update({t.name: t.data_type for t in graph.initializer})
    for info in (*graph.input, *graph.value_info, *graph.output):
        # A sequence or optional has no element type of its own, but its type is known.
        if info.type.tensor_type.elem_type or info.type.WhichOneof("value") not in (None, "tensor_type"):
            types[info.name] = info.type.tensor_type.elem_type
    return types


def cast(source: str, target: str, to: int) -> Any:
    """Returns a Cast node."""
    return helper.make_node("Cast", [source], [target], to=to, name=f"{source} -> {target}")


def _rounded(node: Any, types: Mapping[str, int]) -> list[Any]:
    """Returns the node and the casts after it; the rounded value takes the old name, for its consumers."""
    casts = []
    for index, name in enumerate(node.output):
        if not name:
            continue
        if name not in types:
            raise CompileError(
                f"The type of '{name}', output of {node.domain or 'ai.onnx'}::{node.op_type} '{node.name}', "
                "is not known from shape inference, so it can not be rounded; give it a value_info"
            )
        if types[name] == FLOAT:
            exact, half = f"{name}/sim.exact", f"{name}/sim.half"
            node.output[index] = exact
            casts += [cast(exact, half, FLOAT16), cast(half, name, FLOAT)]
    return [node, *casts]


def _round_tensor(tensor: Any) -> None:
    if tensor.data_type == FLOAT and tensor.data_location != onnx.TensorProto.EXTERNAL:
        values = clip_and_round(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), tensor.name))


def _round_constant(node: Any) -> None:
    for attribute in node.attribute:
        if attribute.name == "value":
            _round_tensor(attribute.t)
        elif attribute.name == "value_float":
            attribute.f = float(clip_and_round(np.array([attribute.f], np.float32))[0])
        elif attribute.name == "value_floats":
            attribute.floats[:] = clip_and_round(np.array(attribute.floats, np.float32)).tolist()
