# SPDX-License-Identifier: Apache-2.0
"""Inlines local functions and the custom operators of QEfficient's exports (card-contract §6.7).

The model's own functions are inlined, nested ones included. Custom operators with a known meaning get a body of
standard operators if the model has no function for them. Others are refused by name.
"""

from __future__ import annotations

from typing import Any

from onnx import inliner, parser

from ..errors import rejected
from ..graph import nodes_of, opset_of
from ..numerics.node_precision import FLOAT32_PREFIX
from .contrib_operators import QUALCOMM
from .static_shapes import check_function

CLOUD, AISW = QUALCOMM
MIN_BODY_OPSET = 13
MOST_NODES = 1_000_000
"""The most nodes after inlining: 30 functions that each call the next twice are 10^9 nodes in 4 kB."""


def inline(model: Any, *, sub_functions: bool = False) -> Any:
    """Inline all functions and the known custom operators, and return the model.

    Args:
        model: ModelProto; changed.
        sub_functions: functions are compiled as units, so shapes inside each must be constant.
    """
    if problem := too_large(model):
        raise rejected(model, problem)
    local = {(function.domain, function.name): function for function in model.functions}
    called = {(node.domain, node.op_type) for node in nodes_of(model.graph)} if sub_functions else set()
    for key in called & local.keys():
        if key[0] not in (CLOUD, AISW):  # the compiler treats these as operators
            check_function(model, local[key], local)
    custom = _custom(model)
    for domain, name in sorted(custom.keys() - local.keys()):
        body = _built_in(domain, name, opset_of(model))
        if body is None:
            why = f"unsupported operator {domain}::{name}, and the model has no function for it"
            raise rejected(model, why, node=custom[domain, name])
        if opset_of(model) < MIN_BODY_OPSET:
            why = f"{domain}::{name} without a function needs opset {MIN_BODY_OPSET} or higher"
            raise rejected(model, why, node=custom[domain, name])
        model.functions.append(parser.parse_function(body))
    if not model.functions:
        return model
    for function in model.functions:
        if (function.domain, function.name) == (AISW, "CustomRMSNorm"):
            _mark_inner_values(function)
    return inliner.inline_local_functions(model, convert_version=True)


def too_large(model: Any) -> str:
    """Return why the functions of a model cannot be inlined: too many nodes, or recursion; empty if they can."""
    calls = {_key(function, function.name): list(map(_called, nodes_of(function))) for function in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    pending, entered = list(calls), set()
    while pending:
        key = pending[-1]
        missing = [] if key in sizes else [name for name in calls[key] if name in calls and name not in sizes]
        if not missing:
            sizes.setdefault(key, min(MOST_NODES + 1, sum(sizes.get(name, 1) for name in calls[key])))
            entered.discard(pending.pop())
        elif key in entered:
            return f"function {key[1]} calls itself, directly or through others"
        else:
            entered.add(key)
            pending += dict.fromkeys(missing)
    nodes = sum(sizes.get(_called(node), 1) for node in nodes_of(model.graph))
    return f"it has more than {MOST_NODES:,} nodes with its functions inlined" if nodes > MOST_NODES else ""


def _called(node: Any) -> tuple[str, str, str]:
    return _key(node, node.op_type)


def _key(item: Any, name: str) -> tuple[str, str, str]:
    return item.domain, name, getattr(item, "overload", "")  # item: a function, or a node that calls it


def _custom(model: Any) -> dict[tuple[str, str], Any]:
    """Return one node for each of Qualcomm's operators, by domain and operator."""
    nodes = [node for part in (model.graph, *model.functions) for node in nodes_of(part)]
    return {(node.domain, node.op_type): node for node in nodes if node.domain in QUALCOMM}


def _mark_inner_values(function: Any) -> None:
    """Give the values inside of a function the prefix of values that are not rounded."""
    names = {
        name: FLOAT32_PREFIX + name
        for node in function.node
        for name in node.output
        if name and name not in function.output
    }
    for node in function.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _built_in(domain: str, name: str, opset: int) -> str | None:
    head = f'<domain: "{domain}", opset_import: ["" : {opset}]>\n'
    if (domain, name) == (AISW, "CustomRMSNorm"):
        return head + _rms_norm(opset)
    if domain != CLOUD:
        return None
    by_row, rank = "CB" in name, 3 if "3D" in name else 4
    if name in ("CtxScatter", "CtxScatter3D", "CtxScatter3DInt", "CtxScatterCB", "CtxScatterCB3D"):
        return head + _scatter(name, rank, by_row=by_row)
    if name in ("CtxGather", "CtxGather3D", "CtxGatherCB", "CtxGatherCB3D"):
        return head + _gather(name, rank, by_row=by_row)
    return None


def _rms_norm(opset: int) -> str:
    mean = "ReduceMean (squares, axes)" if opset >= 18 else "ReduceMean <axes = [-1]> (squares)"
    return f"""CustomRMSNorm <epsilon> (x, weight) => (result) {{
        two = Constant <value_float = 2.0> ()
        axes = Constant <value_ints = [-1]> ()
        squares = Pow (x, two)
        mean = {mean}
        small = Constant <value_float : float = @epsilon> ()
        shifted = Add (mean, small)
        root = Sqrt (shifted)
        unit = Div (x, root)
        scale = Cast <to = 1> (weight)
        result = Mul (unit, scale)
    }}"""


def _scatter(name: str, rank: int, *, by_row: bool) -> str:
    """Return a body that writes `updates` [batch, (heads,) seq, dim] to the slots `position_ids` [batch, seq]."""
    rows = "Reshape (batch_index, minus)" if by_row else "Range (zero, count, unit)"
    coordinates = {"row": [1, 2, 3], "head": [0, 2, 3], "ctx": [1, 3]} if rank == 4 else {"row": [1, 2], "ctx": [2]}
    heads, sizes = "", "batch, seq, one"
    if rank == 4:
        sizes = "batch, heads, seq, one"
        heads = """
        heads = Gather (shape, one)
        head_count = Squeeze (heads)
        head_numbers = Range (zero, head_count, unit)"""
    pieces = "".join(
        f"""
        {key}_axes = Constant <value_ints = {axes}> ()
        {key}_thin = Unsqueeze ({key}_numbers, {key}_axes)
        {key} = Expand ({key}_thin, to)"""
        for key, axes in coordinates.items()
    )
    return f"""{name} (data, {"batch_index, " if by_row else ""}position_ids, updates) => (result) {{
        zero = Constant <value_int = 0> ()
        unit = Constant <value_int = 1> ()
        one = Constant <value_ints = [1]> ()
        minus = Constant <value_ints = [-1]> ()
        shape = Shape (data)
        count = Gather (shape, zero)
        rows = {rows}
        row_numbers = Cast <to = 7> (rows){heads}
        ctx_numbers = Cast <to = 7> (position_ids)
        size = Shape (ctx_numbers)
        seq = Gather (size, one)
        batch = Shape (row_numbers)
        to = Concat <axis = 0> ({sizes}){pieces}
        indices = Concat <axis = -1> ({", ".join(coordinates)})
        result = ScatterND (data, indices, updates)
    }}"""


def _gather(name: str, rank: int, *, by_row: bool) -> str:
    """Return a body that reads the slots `ctx_indices`; `comp_ctx_len` repeats their number and is ignored."""
    rows = "Gather (cache, row_numbers)" if by_row else "Identity (cache)"
    row_numbers = "Reshape (batch_index, minus)" if by_row else "Identity (minus)"
    return f"""{name} (cache, {"batch_index, " if by_row else ""}ctx_indices, comp_ctx_len) => (result) {{
        nought = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        minus = Constant <value_ints = [-1]> ()
        leading = Constant <value_ints = [{rank - 2}]> ()
        row_numbers = {row_numbers}
        data = {rows}
        shape = Shape (data)
        outer = Slice (shape, nought, leading)
        to = Concat <axis = 0> (outer, one)
        wanted = Cast <to = 7> (ctx_indices)
        spread = Expand (wanted, to)
        indices = Unsqueeze (spread, minus)
        result = GatherND <batch_dims = {rank - 2}> (data, indices)
    }}"""
