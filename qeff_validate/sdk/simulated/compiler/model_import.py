# SPDX-License-Identifier: Apache-2.0
"""Imports an ONNX model: checks it, inlines functions, infers types and detaches the weights (§6.7)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import shape_inference

from ..errors import CompileError, rejected
from ..graph import STANDARD, nodes_of, opset_of, shapes_of
from ..weights import Weight, detach
from . import function_inlining
from .contrib_operators import ACCEPTED, contrib_nodes, maker

MIN_OPSET, MAX_OPSET, MAX_IR = 11, 21, 10
_MAX_BYTES = 2**31 - 1
"""protobuf's limit for one message."""


def load(path: Path, *, sub_functions: bool = False) -> tuple[Any, list[Weight]]:
    """Import a model.

    Args:
        path: the ONNX file; external data lies beside it.
        sub_functions: functions are compiled as units, so shapes inside each must be constant.

    Returns:
        The ModelProto, with functions inlined and types inferred, and its detached weights.

    Raises:
        CompileError: the file is missing, damaged, or uses something that the compiler does not support.
    """
    model = _read(path)
    weights = detach(model, path.parent)
    _check(model)
    model = function_inlining.inline(model, sub_functions=sub_functions)
    model.ir_version = max(4, min(model.ir_version, MAX_IR))
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for info in model.graph.value_info:
        if info.type.WhichOneof("value") == "tensor_type":
            # Types help inference. Shapes may be those of the exporter's example and are inferred again.
            info.type.tensor_type.ClearField("shape")
    _declare_quantized_products(model.graph)
    try:
        model = shape_inference.infer_shapes(model)
    except Exception as error:  # onnx raises plain RuntimeError and its own types, depending on the version
        raise rejected(model, str(error)) from error
    _make_scalars(model.graph)
    return model, weights


def supported_operators() -> list[str]:
    """Return the names of the supported operators: those of ONNX up to the highest opset."""
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    return sorted(name for name in names if _has(name, MAX_OPSET))


def float64_warning(graph: Any) -> str | None:
    """Return a warning if a graph has float64 values, which no card is known to support; None otherwise."""
    values = [*graph.initializer, *(info for info in graph.value_info)]
    kinds = {v.name: getattr(v, "data_type", 0) or v.type.tensor_type.elem_type for v in values}
    names = [name for name, kind in kinds.items() if kind == onnx.TensorProto.DOUBLE]
    if not names:
        return None
    return f"{len(names)} values are float64, '{names[0]}' is the first; they stay so here, a card has no such type"


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("the file is larger than 2 GB")
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: the model is missing") from error
    except (DecodeError, ValueError) as error:
        raise CompileError(
            f"QAIC_ERROR: Error message: protobuf parse failure of {path} ({error}); the file is damaged, "
            "not ONNX, or larger than 2 GB without external data"
        ) from error
    if not model.graph.node:
        raise CompileError(f"QAIC_ERROR: Error message: protobuf parse failure of {path}: it has no graph with nodes")
    return model


def _declare_quantized_products(graph: Any) -> None:
    """Declare the type of MatMulNBits outputs, which ONNX cannot infer: it is that of the scales."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    known = {info.name for info in (*graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type == "MatMulNBits" and node.output[0] not in known and node.input[2] in types:
            info = onnx.helper.make_tensor_value_info(node.output[0], types[node.input[2]], None)
            graph.value_info.append(info)


def _make_scalars(graph: Any) -> None:
    """Convert operands of Range with shape [1] to scalars: QEfficient exports them, and a card accepts them."""
    shapes, nodes, scalars = shapes_of(graph), [], set()
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for index, name in enumerate(node.input if node.op_type == "Range" else ()):
            if shapes.get(name) != (1,):
                continue
            node.input[index] = scalar = f"{name}/sim.scalar"
            if scalar not in scalars:
                scalars.add(scalar)
                nodes.append(onnx.helper.make_node("Squeeze", [name], [scalar]))
                graph.value_info.append(onnx.helper.make_tensor_value_info(scalar, types[name], []))
        nodes.append(node)
    if scalars:
        del graph.node[:]
        graph.node.extend(nodes)


def _check(model: Any) -> None:
    opset = opset_of(model)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise rejected(model, f"opset {opset} is not supported; export with {MIN_OPSET} to {MAX_OPSET}")
    if unsupported := list(_unsupported(model)):
        operators = list(dict.fromkeys(node.op_type for node in unsupported))
        more = f": {', '.join(operators)}" if len(operators) > 1 else ""
        why = f"unsupported operator{'s' if more else ''}{more}; see -operators-supported=onnx"
        why += _later(unsupported[0].op_type, opset)
        raise rejected(model, why, node=unsupported[0])
    for node in contrib_nodes(model):
        if (node.domain, node.op_type) not in ACCEPTED:
            why = f"unsupported operator {node.domain}::{node.op_type}, {maker(node.domain, node.op_type)}"
            raise rejected(model, why, node=node)
    if model.graph.sparse_initializer:
        raise rejected(model, "sparse initializers are not supported")
    # The checker requires external data to exist; for a check of the structure, initializers become inputs.
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    inputs = {info.name for info in bare.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in inputs:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        onnx.checker.check_model(bare)
    except onnx.checker.ValidationError as error:
        raise rejected(model, str(error)) from error


def _unsupported(model: Any) -> Iterator[Any]:
    local = {(function.domain, function.name) for function in model.functions}
    for part in (model.graph, *model.functions):
        imports = part.opset_import if isinstance(part, onnx.FunctionProto) else model.opset_import
        opset = max((entry.version for entry in imports if entry.domain in STANDARD), default=opset_of(model))
        for node in nodes_of(part):
            standard = node.domain in STANDARD and (node.domain, node.op_type) not in local
            if standard and not _has(node.op_type, opset):
                yield node


def _later(operator: str, opset: int) -> str:
    """Return that an operator is of a later opset than the graph, and what to do; empty if it is of none."""
    remedy = "save the graph without optimization, or with level basic"
    if operator == "SimplifiedLayerNormalization":
        return f"; {operator} is ONNX Runtime's own, and its optimizer writes it without a domain: {remedy}"
    if not onnx.defs.has(operator, "") or onnx.defs.get_schema(operator, "").since_version <= opset:
        return ""
    return (
        f"; {operator} is of a later opset than the graph's {opset}: ONNX Runtime's optimizer writes it at any opset,"
        f" so export at a later one, or {remedy}"
    )


def _has(operator: str, opset: int) -> bool:
    return onnx.defs.has(operator, opset, "") and not onnx.defs.get_schema(operator, opset, "").deprecated
