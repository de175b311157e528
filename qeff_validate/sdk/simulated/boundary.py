# SPDX-License-Identifier: Apache-2.0
"""What a client sees of a model: binding types, the IoDesc, and the casts between a binding and the graph.

The stored graph has exactly the bindings' types at its border, so the runtime never converts anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from . import QAicApi_pb2 as aicapi
from .errors import CompileError
from .numerics import FLOAT, FLOAT16, cast, exact, moves
from .static import rename

Dims = tuple[int, ...]
T = onnx.TensorProto

# ONNX element type -> (binding type, element type at the stored graph's border); qaic-contract §3.1, §6.7
BINDING_TYPES: dict[int, tuple[int, int]] = {
    int(T.FLOAT): (aicapi.FLOAT_TYPE, int(T.FLOAT)),
    int(T.FLOAT16): (aicapi.FLOAT_16_TYPE, int(T.FLOAT16)),
    int(T.INT64): (aicapi.INT64_I_TYPE, int(T.INT64)),
    int(T.INT32): (aicapi.INT32_I_TYPE, int(T.INT32)),
    int(T.INT8): (aicapi.INT8_TYPE, int(T.INT8)),
    int(T.UINT8): (aicapi.UINT8_Q_TYPE, int(T.UINT8)),
    int(T.BOOL): (aicapi.INT8_TYPE, int(T.INT8)),
}
ITEMSIZE = {
    aicapi.FLOAT_TYPE: 4,
    aicapi.FLOAT_16_TYPE: 2,
    aicapi.INT64_I_TYPE: 8,
    aicapi.INT32_I_TYPE: 4,
    aicapi.INT8_TYPE: 1,
    aicapi.UINT8_Q_TYPE: 1,
}
_PRECISIONS = {"float": FLOAT, "float16": FLOAT16}
_RETAINED = ("_InternalRetainedState", "_RetainedState")


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output: its type in the model, at the stored graph's border, and as a binding."""

    name: str
    is_input: bool
    graph_type: int
    border_type: int
    binding_type: int


def ports(graph: Any, custom: Mapping[str, str]) -> list[Port]:
    """Returns all inputs, then all outputs, of a graph whose inputs are real inputs only.

    Args:
        graph: GraphProto.
        custom: IO name to precision, from the custom IO list.

    Raises:
        CompileError: An unsupported type, or a custom IO entry that does not fit (qaic-contract §6.3).
    """
    found = [_port(info, True, custom) for info in graph.input]
    found += [_port(info, False, custom) for info in graph.output]
    names = [port.name for port in found]
    if unknown := sorted(set(custom) - set(names)):
        raise CompileError(f"Custom IO: no IO is named {', '.join(unknown)}; the model has {', '.join(names)}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CompileError(f"'{repeated[0]}' is more than one input or output; put an Identity between")
    if constant := {tensor.name for tensor in graph.initializer} & set(names):
        raise CompileError(f"Output '{min(constant)}' is a constant; put an Identity between")
    return found


def _port(info: Any, is_input: bool, custom: Mapping[str, str]) -> Port:
    what = f"{'input' if is_input else 'output'} '{info.name}'"
    element = info.type.tensor_type.elem_type
    if element not in BINDING_TYPES:
        kind = T.DataType.Name(element).lower() if element else info.type.WhichOneof("value") or "of unknown type"
        raise CompileError(f"The type of {what} is {kind}, which the card does not support")
    binding, border = BINDING_TYPES[element]
    if precision := custom.get(info.name):
        if precision not in _PRECISIONS:
            raise CompileError(f"Custom IO: {precision} of {what} is not simulated; use float or float16")
        if element not in (FLOAT, FLOAT16):
            raise CompileError(f"Custom IO: {what} is not a float type, so it can not become {precision}")
        binding, border = BINDING_TYPES[_PRECISIONS[precision]]
    return Port(info.name, is_input, element, border, binding)


def apply(graph: Any, all_ports: Sequence[Port], *, fp16: bool) -> None:
    """Puts the casts between the bindings and the graph, and rounds float inputs at entry if `fp16`."""
    border = {port.name: port.border_type for port in all_ports}
    entry, leave, renamed = [], [], {}
    for port in all_ports:
        inner = f"{port.name}/sim.inner"
        rounds = fp16 and port.is_input and port.graph_type == port.border_type == FLOAT
        if rounds:
            half = f"{port.name}/sim.entry"
            entry += [cast(port.name, half, FLOAT16), cast(half, inner, FLOAT)]
        elif port.graph_type == port.border_type:
            continue
        elif port.is_input:
            entry.append(cast(port.name, inner, port.graph_type))
        else:
            leave.append(cast(inner, port.name, port.border_type))
        renamed[port.name] = inner
        if port.is_input:
            # What nodes in float32 read.
            renamed[exact(port.name)] = port.name if rounds else inner
    rename(graph, renamed)
    if fp16:
        leave = _scatter_halves(graph, entry, leave)
    nodes = [*entry, *graph.node, *leave]
    del graph.node[:]
    graph.node.extend(nodes)
    for info in (*graph.input, *graph.output):
        info.type.tensor_type.elem_type = border[info.name]


def _scatter_halves(graph: Any, entry: Sequence[Any], leave: Sequence[Any]) -> list[Any]:
    """Lets a cache that is fp16 on both sides be written as such, and returns the casts that are left.

    Without this, each step would cast the whole cache twice for the sake of a few new slots.
    """
    arriving = {node.output[0]: node.input[0] for node in entry if node.attribute[0].i == FLOAT}
    leaving = {node.input[0]: node for node in leave if node.attribute[0].i == FLOAT16}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        scatters = node.op_type in ("ScatterElements", "ScatterND") and moves(node)
        if not scatters or node.input[0] not in arriving or node.output[0] not in leaving:
            graph.node.append(node)
            continue
        wide, target = node.output[0], leaving.pop(node.output[0]).output[0]
        updates = f"{target}/sim.updates"
        graph.node.append(cast(node.input[2], updates, FLOAT16))
        node.input[0], node.input[2], node.output[0] = arriving[node.input[0]], updates, target
        graph.node.extend([node, cast(target, wide, FLOAT)])
    return [node for node in leave if node.input[0] in leaving or node.attribute[0].i != FLOAT16]


def retained_pairs(all_ports: Sequence[Port], shapes: Sequence[Sequence[Dims]]) -> dict[str, str]:
    """Returns input X -> output X_RetainedState or X_InternalRetainedState, by name alone (qaic-contract §4.5).

    Raises:
        CompileError: The two of a pair differ in type or dims, so they can not share memory.
    """
    inputs = {port.name: index for index, port in enumerate(all_ports) if port.is_input}
    pairs: dict[str, str] = {}
    for index, port in enumerate(all_ports):
        name = next((port.name[: -len(end)] for end in _RETAINED if port.name.endswith(end)), None)
        if port.is_input or name not in inputs:
            continue
        if name in pairs:
            raise CompileError(f"'{name}' has two retained outputs, '{pairs[name]}' and '{port.name}'")
        if port.binding_type != all_ports[inputs[name]].binding_type:
            raise CompileError(
                f"'{name}' and '{port.name}' are one retained state and must have one type; "
                "give a custom IO precision for both or for neither"
            )
        for entry in shapes:
            if (before := entry[inputs[name]]) != (after := entry[index]):
                raise CompileError(f"'{name}' {list(before)} is retained as '{port.name}' {list(after)}")
        pairs[name] = port.name
    return pairs


def io_desc(
    all_ports: Sequence[Port],
    shapes: Sequence[Sequence[Dims]],
    *,
    specialized: bool,
    partial: Collection[str] = (),
) -> bytes:
    """Returns the serialized IoDesc (qaic-contract §3.3).

    Args:
        all_ports: Inputs, then outputs.
        shapes: Per specialization the dims of every port; one entry if there are no specializations.
        specialized: Whether the shapes become `allowed_shapes`, which are empty otherwise.
        partial: Names of the bindings that a client may skip or fill in part.
    """
    desc = aicapi.IoDesc()
    desc.selected_set.name = "default"
    for index, port in enumerate(all_ports):
        dims = max((entry[index] for entry in shapes), key=lambda d: (math.prod(d), d))
        size = ITEMSIZE[port.binding_type] * math.prod(d or 1 for d in dims)
        if size >= 2**32:
            raise CompileError(f"'{port.name}' {list(dims)} has {size} bytes; a binding holds less than 4 GiB")
        direction = aicapi.BUFFER_IO_TYPE_INPUT if port.is_input else aicapi.BUFFER_IO_TYPE_OUTPUT
        desc.selected_set.bindings.add(
            name=port.name,
            index=index,
            type=port.binding_type,
            dir=direction,
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
