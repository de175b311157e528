# SPDX-License-Identifier: Apache-2.0
"""Half precision on a CPU: the outputs of each node are fp16 values, computed in fp32 (card-contract §7).

The graph stays a float32 graph, so ONNX Runtime has a kernel for every node. Rounding is made explicit:

* **Constants** (initializers, Constant and ConstantOfShape values) are clipped to ±65504 and rounded when the
  model is compiled. Clipping turns mask constants such as -3.4e38, and infinities, into finite values, as
  QEfficient does before it compiles for a card. NaN stays NaN: a damaged weight must show.
* **Computed values** go through Cast(float16), Cast(float) after each node with a float32 output. This rounds to
  nearest-even, keeps subnormals, and overflows to infinity: nothing is clipped, so overflow shows as well.
* **Moved values** (Reshape, Gather, Where, Max, …: each output element is an input element, or exact as Neg's is)
  need none.
* **Inputs** of type float are rounded at entry (`compiler/io_bindings.py`). Outputs keep their type, with fp16 values.
* **Nodes in float32** (see `node_precision.py`) read unrounded values where they exist: inputs, constants, and
  outputs of other nodes in float32. All other nodes read the rounded value.

Attributes (an epsilon) are not rounded. A model exported in fp16, or in bf16 for a card that has it, computes in fp32
and rounds each value to its type, whatever the flags. Values of other types, float64 included, are left as they are.

Unknown properties of the card, which may differ: the width of its accumulators (fp32 is assumed), whether it
flushes subnormals, which nodes it fuses and thus does not round between, its approximations of exp, erf, tanh
and the like, and the precision inside LayerNormalization and Softmax (fp32 inside, rounded once, is assumed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..errors import CompileError, named
from ..graph import BFLOAT16, FLOAT, FLOAT16, STANDARD, rename, subgraphs, value_types
from ..weights import Weight
from .node_precision import Plan

FP16_MAX = 65504.0

# Each output element is an input element, or exact in fp16 if the input is, so it needs no rounding.
# Control flow returns the outputs of its subgraphs, which are rounded themselves.
_MOVES = frozenset(
    {
        "Abs", "Ceil", "Clip", "Compress", "Concat", "ConcatFromSequence", "DepthToSpace", "Expand", "Flatten",
        "Floor", "Gather", "GatherElements", "GatherND", "Identity", "If", "Loop", "Max", "MaxPool", "Min", "Neg",
        "OneHot", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape", "ReverseSequence", "Round", "Scan", "Sign",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip
# Operators whose output type is determined by an attribute or another input.
_TYPED = frozenset(
    {
        "Bernoulli", "Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "Multinomial", "RandomNormal",
        "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    }
)  # fmt: skip


def clip_and_round(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return a constant clipped to ±65504 and rounded to fp16, as float32; NaN stays NaN."""
    return np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16).astype(np.float32)


def round_weight(weight: Weight) -> Weight:
    """Return the weight with its float32 values rounded as they are read; other types are unchanged."""
    if weight.data_type != FLOAT:
        return weight

    def chunks() -> Iterator[bytes]:
        for chunk in weight.chunks():
            yield clip_and_round(np.frombuffer(chunk, np.float32)).tobytes()

    return replace(weight, chunks=chunks)


def unrounded(name: str) -> str:
    """Return the name of a value before its rounding."""
    return f"{name}/sim.exact"


def round_graph(graph: Any, types: Mapping[str, int], plan: Plan | None = None) -> None:
    """Insert fp16 rounding into a float32 graph and its subgraphs, in place; stubs of weights are unchanged.

    Args:
        graph: GraphProto.
        types: element type of every value that is visible in the graph, as `graph.value_types` returns it.
        plan: the nodes that compute in float32; by default none.
    """
    plan = plan or Plan()
    unrounded_values = {name for name in plan.unrounded_values(graph) if types.get(name) == FLOAT}
    _round(graph, types, plan, plan.readable(graph))
    # an output of the graph is unrounded if its node's output is
    for name in unrounded_values & {info.name for info in graph.output}:
        rename(graph, {name: f"{name}/sim.rounded", unrounded(name): name})


def _round(graph: Any, types: Mapping[str, int], plan: Plan, readable: AbstractSet[str]) -> None:
    for tensor in list(graph.initializer):
        if tensor.name in readable and tensor.data_type == FLOAT:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = unrounded(tensor.name)
        _round_tensor(tensor)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        in_float32 = plan.computes_in_float32(node)
        if in_float32:
            node.input[:] = [unrounded(n) if n in readable and types.get(n) == FLOAT else n for n in node.input]
        for subgraph in subgraphs(node):
            _round(subgraph, value_types(subgraph, types), plan, readable)
        if node.op_type in ("Constant", "ConstantOfShape"):
            graph.node.extend(_constants(node, readable))
        elif not in_float32 and moves(node):
            graph.node.append(node)
        else:
            graph.node.extend(_rounded(node, types))


def moves(node: Any) -> bool:
    """Return True if the outputs of a node need no rounding, provided that its inputs are rounded."""
    if node.domain not in STANDARD:
        return False
    if node.op_type in ("ScatterElements", "ScatterND"):
        return all(a.name != "reduction" or a.s == b"none" for a in node.attribute)
    return node.op_type in _MOVES


def _constants(node: Any, readable: AbstractSet[str]) -> Iterator[Any]:
    if node.output[0] in readable:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.output[0] = unrounded(node.output[0])
        copy.name = unrounded(node.name) if node.name else ""  # ONNX Runtime refuses a name that is there twice
        yield copy
    _round_constant(node)
    yield node


def compute_halves_in_float(graph: Any, types: Mapping[str, int]) -> None:
    """Insert casts so that nodes in fp16 or bf16 compute in fp32 and round their outputs, in place.

    ONNX Runtime has few kernels for fp16: it runs chains of such nodes in fp32 and rounds at the end of the chain. It
    has hardly any for bf16, not even for operators that only move values.
    """
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for subgraph in subgraphs(node):
            compute_halves_in_float(subgraph, value_types(subgraph, types))
        halves = {name: types[name] for name in (*node.input, *node.output) if types.get(name) in (FLOAT16, BFLOAT16)}
        if not _needs_float32(node, halves):
            graph.node.append(node)
            continue
        end = f"/sim.float.{next(name for name in node.output if name)}"
        inputs = {name: name + end for name in dict.fromkeys(node.input) if name in halves}
        outputs = [name for name in node.output if name in halves]
        graph.node.extend(cast(name, wide, FLOAT) for name, wide in inputs.items())
        node.input[:] = [inputs.get(name, name) for name in node.input]
        node.output[:] = [unrounded(name) if name in outputs else name for name in node.output]
        graph.node.append(node)
        graph.node.extend(cast(unrounded(name), name, halves[name]) for name in outputs)


def _needs_float32(node: Any, halves: Mapping[str, int]) -> bool:
    """Return True if a node must compute its values in fp16 and bf16 with float32 kernels.

    Args:
        node: NodeProto.
        halves: element types of its fp16 and bf16 inputs and outputs.
    """
    if node.domain not in STANDARD or node.op_type in _TYPED or subgraphs(node):
        return False
    if BFLOAT16 in halves.values():
        return True
    return any(name in halves for name in node.output) and not moves(node)


def cast(source: str, target: str, to: int) -> Any:
    """Return a Cast node."""
    return helper.make_node("Cast", [source], [target], to=to, name=f"{source} -> {target}")


def _rounded(node: Any, types: Mapping[str, int]) -> list[Any]:
    """Return the node and the casts after it; the rounded value takes the original name, for its consumers."""
    casts = []
    for index, name in enumerate(node.output):
        if not name:
            continue
        if name not in types:
            raise CompileError(
                f"simulator: the type of '{name}', output of {named(node)}, "
                "is not known from shape inference, so it can not be rounded; give it a value_info"
            )
        if types[name] == FLOAT:
            before, half = unrounded(name), f"{name}/sim.half"
            node.output[index] = before
            casts += [cast(before, half, FLOAT16), cast(half, name, FLOAT)]
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
