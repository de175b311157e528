# SPDX-License-Identifier: Apache-2.0
"""The bindings of a model: their types, the IoDesc, and the casts between a binding and the graph.

The inputs and outputs of the stored graph have the types of the bindings, so the runtime converts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..bindings import QAicApi_pb2 as aicapi
from ..errors import CompileError
from ..graph import BFLOAT16, FLOAT, FLOAT16, STANDARD, Dims, names_read, rename
from ..numerics.fp16_rounding import cast, moves, unrounded
from .custom_io import PortFormat

T = onnx.TensorProto

BINDING_TYPES: dict[int, tuple[int, int]] = {
    int(T.FLOAT): (aicapi.FLOAT_TYPE, int(T.FLOAT)),
    int(T.FLOAT16): (aicapi.FLOAT_16_TYPE, int(T.FLOAT16)),
    # numpy has no bfloat16, so the runtime converts bits
    int(T.BFLOAT16): (aicapi.BFLOAT16_TYPE, int(T.FLOAT)),
    int(T.INT64): (aicapi.INT64_I_TYPE, int(T.INT64)),
    int(T.INT32): (aicapi.INT32_I_TYPE, int(T.INT32)),
    int(T.INT8): (aicapi.INT8_TYPE, int(T.INT8)),
    int(T.UINT8): (aicapi.UINT8_Q_TYPE, int(T.UINT8)),
    int(T.BOOL): (aicapi.INT8_TYPE, int(T.INT8)),
}
"""Binding type, and element type at the stored graph's border, by the model's element type (§3.1, §6.7)."""
ITEMSIZE = {
    aicapi.FLOAT_TYPE: 4,
    aicapi.FLOAT_16_TYPE: 2,
    aicapi.BFLOAT16_TYPE: 2,
    aicapi.INT8_Q_TYPE: 1,
    aicapi.INT64_I_TYPE: 8,
    aicapi.INT32_I_TYPE: 4,
    aicapi.INT8_TYPE: 1,
    aicapi.UINT8_Q_TYPE: 1,
}
# The precisions of custom IO; mxint8 is transferred as the fp16 values of its blocks.
_PRECISIONS: dict[str, tuple[int, int]] = {
    "float": BINDING_TYPES[FLOAT],
    "float16": BINDING_TYPES[FLOAT16],
    "mxint8": BINDING_TYPES[FLOAT16],
    "bfloat16": BINDING_TYPES[BFLOAT16],
    "int8": (aicapi.INT8_Q_TYPE, int(T.INT8)),
}
FLOATS, INT8 = (FLOAT, FLOAT16, BFLOAT16), int(T.INT8)
_HALF = "/sim.entry"
_READS, _SCATTERS = ("Gather", "GatherND", "Reshape", "Slice"), ("ScatterElements", "ScatterND")
_RETAINED = ("_InternalRetainedState", "_RetainedState")


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output.

    Attributes:
        name: of the input or output.
        is_input: True for an input.
        graph_type: ONNX element type in the model.
        border_type: ONNX element type at the border of the stored graph.
        binding_type: type of the binding (card-contract §3.1).
        custom: the format from the custom IO list; None if it is not listed.
    """

    name: str
    is_input: bool
    graph_type: int
    border_type: int
    binding_type: int
    custom: PortFormat | None = None

    @property
    def scaled(self) -> PortFormat | None:
        """The custom format if values are quantized or compressed; None otherwise."""
        return self.custom if self.custom and self.custom.precision in ("int8", "mxint8") else None


def ports(graph: Any, custom: Mapping[str, PortFormat]) -> list[Port]:
    """Return all inputs, then all outputs of a graph.

    Args:
        graph: GraphProto; initializers are not among its inputs.
        custom: formats by name, from the custom IO list.

    Raises:
        CompileError: a type is not supported, or a custom IO entry does not fit (card-contract §6.3).
    """
    all_ports = [_port(info, True, custom) for info in graph.input]
    all_ports += [_port(info, False, custom) for info in graph.output]
    names = [port.name for port in all_ports]
    if unknown := sorted(set(custom) - set(names)):
        raise CompileError(f"Custom IO: no IO is named {', '.join(unknown)}; the model has {', '.join(names)}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CompileError(f"'{repeated[0]}' is more than one input or output; put an Identity between")
    if constant := {tensor.name for tensor in graph.initializer} & set(names):
        raise CompileError(f"Output '{min(constant)}' is a constant; put an Identity between")
    return all_ports


def _port(info: Any, is_input: bool, custom: Mapping[str, PortFormat]) -> Port:
    what = f"{'input' if is_input else 'output'} '{info.name}'"
    element = info.type.tensor_type.elem_type
    if element not in BINDING_TYPES:
        kind = T.DataType.Name(element).lower() if element else info.type.WhichOneof("value") or "of unknown type"
        raise CompileError(f"The type of {what} is {kind}, which the card does not support")
    binding, border = BINDING_TYPES[element]
    custom_format = custom.get(info.name)
    if custom_format is not None:
        if custom_format.precision not in _PRECISIONS:
            known = ", ".join(_PRECISIONS)
            raise CompileError(f"Custom IO: {custom_format.precision} of {what} is not simulated; use {known}")
        if element not in FLOATS:
            raise CompileError(f"Custom IO: {what} is not a float type, so it can not become {custom_format.precision}")
        binding, border = _PRECISIONS[custom_format.precision]
    return Port(info.name, is_input, element, border, binding, custom_format)


def insert_conversions(graph: Any, all_ports: Sequence[Port], *, fp16: bool) -> None:
    """Insert the conversions between the bindings and the graph, in place; round float inputs if `fp16`."""
    border = {port.name: port.border_type for port in all_ports}
    entry: list[Any] = []
    leave: list[Any] = []
    renamed: dict[str, str] = {}
    for port in all_ports:
        inner = f"{port.name}/sim.inner"
        nodes = _input_nodes(graph, port, inner, fp16) if port.is_input else _output_nodes(graph, port, inner)
        if not nodes:
            continue
        (entry if port.is_input else leave).extend(nodes)
        renamed[port.name] = inner
        if port.is_input:
            # nodes in float32 read the value before rounding
            rounds = fp16 and port.graph_type == FLOAT and nodes[-1].input[0].endswith(_HALF)
            renamed[unrounded(port.name)] = nodes[-2].input[0] if rounds else inner
    rename(graph, renamed)
    if fp16:
        leave = _move_halves(graph, entry, leave)
    all_nodes = [*entry, *graph.node, *leave]
    read = {name for node in all_nodes for name in names_read(node)} | {info.name for info in graph.output}
    all_nodes = [node for node in all_nodes if node.op_type != "Cast" or read & set(node.output)]
    del graph.node[:]
    graph.node.extend(all_nodes)
    for info in (*graph.input, *graph.output):
        info.type.tensor_type.elem_type = border[info.name]


def _input_nodes(graph: Any, port: Port, inner: str, fp16: bool) -> list[Any]:
    """Return the nodes from a binding to an input of the graph; none if they are the same."""
    name, kind, nodes = port.name, port.border_type, []
    if kind == INT8 and port.custom:
        name, kind = f"{port.name}/sim.dequantized", FLOAT
        nodes.append(_linear(graph, "DequantizeLinear", port, port.name, name))
    if fp16 and kind == port.graph_type == FLOAT:
        half = f"{port.name}{_HALF}"
        return [*nodes, cast(name, half, FLOAT16), cast(half, inner, FLOAT)]
    if kind != port.graph_type or nodes:
        nodes.append(cast(name, inner, port.graph_type))
    return nodes


def _output_nodes(graph: Any, port: Port, inner: str) -> list[Any]:
    """Return the nodes from an output of the graph to its binding; none if they are the same."""
    if port.border_type == INT8 and port.custom:
        wide = f"{port.name}/sim.wide"
        return [cast(inner, wide, FLOAT), _linear(graph, "QuantizeLinear", port, wide, port.name)]
    if port.binding_type == aicapi.BFLOAT16_TYPE and port.graph_type != BFLOAT16:
        narrow = f"{port.name}/sim.narrow"
        return [cast(inner, narrow, BFLOAT16), cast(narrow, port.name, FLOAT)]
    return [] if port.graph_type == port.border_type else [cast(inner, port.name, port.border_type)]


def _linear(graph: Any, operator: str, port: Port, source: str, target: str) -> Any:
    """Return a node between int8 and float32; ONNX saturates, and rounds half to even."""
    assert port.custom is not None
    scale, zero = f"{port.name}/sim.scale", f"{port.name}/sim.zero"
    graph.initializer.append(numpy_helper.from_array(np.array(port.custom.scale, np.float32), scale))
    graph.initializer.append(numpy_helper.from_array(np.array(port.custom.offset, np.int8), zero))
    return helper.make_node(operator, [source, scale, zero], [target], name=f"{source} -> {target}")


def _move_halves(graph: Any, entry: Sequence[Any], leave: Sequence[Any]) -> list[Any]:
    """Make nodes that only move elements of an fp16 cache work on fp16; return the output casts still needed.

    These are scatters into it, views, slices and gathers of it. Otherwise each step would cast the whole cache several
    times to write a few new slots.
    """
    halves = {node.output[0]: node.input[0] for node in entry if _casts(node, FLOAT)}
    leaving = {node.input[0]: node for node in leave if _casts(node, FLOAT16)}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        moved = node.input[0] if node.input and node.domain in STANDARD else ""
        if moved not in halves or node.op_type not in (*_READS, *_SCATTERS, "Shape"):
            graph.node.append(node)
        elif node.op_type in _SCATTERS:
            if not moves(node) or node.output[0] not in leaving:
                graph.node.append(node)
                continue
            wide, target = node.output[0], leaving.pop(node.output[0]).output[0]
            updates = f"{target}/sim.updates"
            graph.node.append(cast(node.input[2], updates, FLOAT16))
            node.input[0], node.input[2], node.output[0] = halves[moved], updates, target
            graph.node.extend([node, cast(target, wide, FLOAT)])
            halves[wide] = target
        else:
            result, node.input[0] = node.output[0], halves[moved]
            node.output[0] = result if node.op_type == "Shape" else f"{result}/sim.part"
            graph.node.append(node)
            if node.op_type != "Shape":
                graph.node.append(cast(node.output[0], result, FLOAT))
                halves[result] = node.output[0]  # of a view, a part may be read
    return [node for node in leave if node.input[0] in leaving or not _casts(node, FLOAT16)]


def _casts(node: Any, to: int) -> bool:
    return bool(node.op_type == "Cast" and node.attribute[0].i == to)


def retained_pairs(all_ports: Sequence[Port], shapes: Sequence[Sequence[Dims]]) -> dict[str, str]:
    """Return the output X_RetainedState or X_InternalRetainedState of each input X, by name (card-contract §4.5).

    Raises:
        CompileError: input and output of a pair differ in type or dims, so they cannot share memory.
    """
    inputs = {port.name: index for index, port in enumerate(all_ports) if port.is_input}
    pairs: dict[str, str] = {}
    for index, port in enumerate(all_ports):
        name = next((port.name[: -len(end)] for end in _RETAINED if port.name.endswith(end)), None)
        if port.is_input or name not in inputs:
            continue
        if name in pairs:
            raise CompileError(f"'{name}' has two retained outputs, '{pairs[name]}' and '{port.name}'")
        state = all_ports[inputs[name]]
        if (port.binding_type, port.scaled) != (state.binding_type, state.scaled):
            raise CompileError(
                f"'{name}' and '{port.name}' are one retained state and must have one type; "
                "give a custom IO precision for both or for neither"
            )
        for entry in shapes:
            if (dims := entry[inputs[name]]) != entry[index]:
                raise CompileError(f"'{name}' {list(dims)} is retained as '{port.name}' {list(entry[index])}")
        pairs[name] = port.name
    return pairs


def io_desc(
    all_ports: Sequence[Port],
    shapes: Sequence[Sequence[Dims]],
    *,
    specialized: bool,
    partial: Collection[str] = (),
) -> bytes:
    """Return the serialized IoDesc (card-contract §3.3).

    Args:
        all_ports: inputs, then outputs.
        shapes: per specialization the dims of every port; one entry if there are no specializations.
        specialized: the shapes become `allowed_shapes`; otherwise these are empty.
        partial: names of the bindings that a client may skip or fill in part.

    Raises:
        CompileError: a binding has 4 GiB or more.
    """
    desc = aicapi.IoDesc()
    desc.selected_set.name = "default"
    for index, port in enumerate(all_ports):
        dims = max((entry[index] for entry in shapes), key=lambda d: (math.prod(d), d))
        size = ITEMSIZE[port.binding_type] * math.prod(d or 1 for d in dims)
        if size >= 2**32:
            raise CompileError(f"'{port.name}' {list(dims)} has {size} bytes; a binding holds less than 4 GiB")
        direction = aicapi.BUFFER_IO_TYPE_INPUT if port.is_input else aicapi.BUFFER_IO_TYPE_OUTPUT
        scaled = port.scaled or PortFormat("", scale=0)
        desc.selected_set.bindings.add(
            name=port.name,
            index=index,
            type=port.binding_type,
            dir=direction,
            quant_scale=scaled.scale,
            quant_offset=scaled.offset,
            dims=dims,
            size=size,
            is_partial_buf_allowed=port.name in partial,
            is_valid=True,
        )
    desc.io_sets.add().CopyFrom(desc.selected_set)
    for entry in shapes if specialized else ():
        allowed = desc.allowed_shapes.add()
        for port, dims in zip(all_ports, entry, strict=True):
            allowed.shapes.add(type=port.binding_type, dims=dims)
    return bytes(desc.SerializeToString())
