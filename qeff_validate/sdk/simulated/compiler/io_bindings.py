# SPDX-License-Identifier: Apache-2.0
"""What a client sees of a model: binding types, the IoDesc, and the casts between a binding and the graph.

The stored graph has exactly the bindings' types at its border, so the runtime never converts anything.
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
from ..graph import BFLOAT16, FLOAT, FLOAT16, Dims, rename
from ..numerics.fp16_rounding import cast, exact, moves
from .custom_io import Wanted

T = onnx.TensorProto

# ONNX element type -> (binding type, element type at the stored graph's border); card-contract §3.1, §6.7
BINDING_TYPES: dict[int, tuple[int, int]] = {
    int(T.FLOAT): (aicapi.FLOAT_TYPE, int(T.FLOAT)),
    int(T.FLOAT16): (aicapi.FLOAT_16_TYPE, int(T.FLOAT16)),
    # numpy has no such type, so the runtime converts bits
    int(T.BFLOAT16): (aicapi.BFLOAT16_TYPE, int(T.FLOAT)),
    int(T.INT64): (aicapi.INT64_I_TYPE, int(T.INT64)),
    int(T.INT32): (aicapi.INT32_I_TYPE, int(T.INT32)),
    int(T.INT8): (aicapi.INT8_TYPE, int(T.INT8)),
    int(T.UINT8): (aicapi.UINT8_Q_TYPE, int(T.UINT8)),
    int(T.BOOL): (aicapi.INT8_TYPE, int(T.INT8)),
}
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
# Custom IO; mxint8 travels as the fp16 numbers that its blocks stand for.
_PRECISIONS: dict[str, tuple[int, int]] = {
    "float": BINDING_TYPES[FLOAT],
    "float16": BINDING_TYPES[FLOAT16],
    "mxint8": BINDING_TYPES[FLOAT16],
    "bfloat16": BINDING_TYPES[BFLOAT16],
    "int8": (aicapi.INT8_Q_TYPE, int(T.INT8)),
}
FLOATS, INT8 = (FLOAT, FLOAT16, BFLOAT16), int(T.INT8)
_HALF = "/sim.entry"
_RETAINED = ("_InternalRetainedState", "_RetainedState")


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output: its type in the model, at the stored graph's border, and as a binding."""

    name: str
    is_input: bool
    graph_type: int
    border_type: int
    binding_type: int
    custom: Wanted | None = None

    @property
    def scaled(self) -> Wanted | None:
        """What a number of the binding stands for, if not for itself."""
        return self.custom if self.custom and self.custom.precision in ("int8", "mxint8") else None


def ports(graph: Any, custom: Mapping[str, Wanted]) -> list[Port]:
    """Returns all inputs, then all outputs, of a graph whose inputs are real inputs only.

    Args:
        graph: GraphProto.
        custom: IO name to what is wanted, from the custom IO list.

    Raises:
        CompileError: An unsupported type, or a custom IO entry that does not fit (card-contract §6.3).
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


def _port(info: Any, is_input: bool, custom: Mapping[str, Wanted]) -> Port:
    what = f"{'input' if is_input else 'output'} '{info.name}'"
    element = info.type.tensor_type.elem_type
    if element not in BINDING_TYPES:
        kind = T.DataType.Name(element).lower() if element else info.type.WhichOneof("value") or "of unknown type"
        raise CompileError(f"The type of {what} is {kind}, which the card does not support")
    binding, border = BINDING_TYPES[element]
    wanted = custom.get(info.name)
    if wanted is not None:
        if wanted.precision not in _PRECISIONS:
            known = ", ".join(_PRECISIONS)
            raise CompileError(f"Custom IO: {wanted.precision} of {what} is not simulated; use {known}")
        if element not in FLOATS:
            raise CompileError(f"Custom IO: {what} is not a float type, so it can not become {wanted.precision}")
        binding, border = _PRECISIONS[wanted.precision]
    return Port(info.name, is_input, element, border, binding, wanted)


def apply(graph: Any, all_ports: Sequence[Port], *, fp16: bool) -> None:
    """Puts the conversions between the bindings and the graph, and rounds float inputs at entry if `fp16`."""
    border = {port.name: port.border_type for port in all_ports}
    entry: list[Any] = []
    leave: list[Any] = []
    renamed: dict[str, str] = {}
    for port in all_ports:
        inner = f"{port.name}/sim.inner"
        found = _entering(graph, port, inner, fp16) if port.is_input else _leaving(graph, port, inner)
        if not found:
            continue
        (entry if port.is_input else leave).extend(found)
        renamed[port.name] = inner
        if port.is_input:
            # What nodes in float32 read.
            rounds = fp16 and port.graph_type == FLOAT and found[-1].input[0].endswith(_HALF)
            renamed[exact(port.name)] = found[-2].input[0] if rounds else inner
    rename(graph, renamed)
    if fp16:
        leave = _scatter_halves(graph, entry, leave)
    nodes = [*entry, *graph.node, *leave]
    del graph.node[:]
    graph.node.extend(nodes)
    for info in (*graph.input, *graph.output):
        info.type.tensor_type.elem_type = border[info.name]


def _entering(graph: Any, port: Port, inner: str, fp16: bool) -> list[Any]:
    """Returns the nodes from a binding to an input of the graph; none if they are the same."""
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


def _leaving(graph: Any, port: Port, inner: str) -> list[Any]:
    """Returns the nodes from an output of the graph to its binding; none if they are the same."""
    if port.border_type == INT8 and port.custom:
        wide = f"{port.name}/sim.wide"
        return [cast(inner, wide, FLOAT), _linear(graph, "QuantizeLinear", port, wide, port.name)]
    if port.binding_type == aicapi.BFLOAT16_TYPE and port.graph_type != BFLOAT16:
        narrow = f"{port.name}/sim.narrow"
        return [cast(inner, narrow, BFLOAT16), cast(narrow, port.name, FLOAT)]
    return [] if port.graph_type == port.border_type else [cast(inner, port.name, port.border_type)]


def _linear(graph: Any, operator: str, port: Port, source: str, target: str) -> Any:
    """Returns a node between int8 and float32; ONNX saturates, and rounds half to even."""
    assert port.custom is not None
    scale, zero = f"{port.name}/sim.scale", f"{port.name}/sim.zero"
    graph.initializer.append(numpy_helper.from_array(np.array(port.custom.scale, np.float32), scale))
    graph.initializer.append(numpy_helper.from_array(np.array(port.custom.offset, np.int8), zero))
    return helper.make_node(operator, [source, scale, zero], [target], name=f"{source} -> {target}")


def _scatter_halves(graph: Any, entry: Sequence[Any], leave: Sequence[Any]) -> list[Any]:
    """Lets a cache that is fp16 on both sides be written as such, and returns the casts that are left.

    Without this, each step would cast the whole cache twice for the sake of a few new slots.
    """
    arriving = {node.output[0]: node.input[0] for node in entry if _casts(node, FLOAT)}
    leaving = {node.input[0]: node for node in leave if _casts(node, FLOAT16)}
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
    return [node for node in leave if node.input[0] in leaving or not _casts(node, FLOAT16)]


def _casts(node: Any, to: int) -> bool:
    return bool(node.op_type == "Cast" and node.attribute[0].i == to)


def retained_pairs(all_ports: Sequence[Port], shapes: Sequence[Sequence[Dims]]) -> dict[str, str]:
    """Returns input X -> output X_RetainedState or X_InternalRetainedState, by name alone (card-contract §4.5).

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
        before = all_ports[inputs[name]]
        if (port.binding_type, port.scaled) != (before.binding_type, before.scaled):
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
    """Returns the serialized IoDesc (card-contract §3.3).

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
        scaled = port.scaled or Wanted("", scale=0)
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
