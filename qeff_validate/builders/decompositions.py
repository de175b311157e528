# SPDX-License-Identifier: Apache-2.0
"""Spares an export the traces with which the exporter decomposes operators.

`torch.onnx.export` captures a module and then traces the graph twice more, to replace operators that have no form in
ONNX by others that have one. That is up to 70 % of the time of an export. Graphs of transformers hold only a few such
operators: some have an equivalent of the same arguments, some write into a tensor that was made in the graph, and
others are decomposed alone, at their place in the graph. Only a graph with still others is traced again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from qeff_validate.builders.tensor_writes import operator, replace_writes

EQUIVALENTS = {
    "__and__.Tensor": "bitwise_and.Tensor",
    "__or__.Tensor": "bitwise_or.Tensor",
    "__xor__.Tensor": "bitwise_xor.Tensor",
    "detach_.default": "detach.default",
    "min.other": "minimum.default",
    "max.other": "maximum.default",
}
"""Operators of ATen, each with one that has the same arguments and values, and a form in ONNX."""

CONVERSIONS = ("to.dtype", "to.device", "to.dtype_layout", "type_as.default")
"""Operators that change the dtype, or nothing."""

VIEWS = ("reshape.default", "narrow.default", "chunk.default", "contiguous.default", "flatten.using_ints", "mT.default")
"""Composite operators with a form in ONNX that torch's tables of decompositions do not mention, as they make views."""


@contextlib.contextmanager
def needed_decompositions() -> Iterator[None]:
    """Within this context a captured graph is decomposed only if it holds an operator that needs it.

    Gradients are off, so that ``torch.no_grad`` in a model is no region of its own. The cache of fake tensors is off,
    because with symbolic dims an entry costs more to check than to compute.
    """
    import torch

    program = torch.export.ExportedProgram
    decompose = program.run_decompositions

    def run_decompositions(self: Any, table: Any = None, *args: Any, **options: Any) -> Any:
        if table is None:
            return decompose(self, table, *args, **options)
        table = {**table, **{operator(name): function for name, function in OWN.items()}}
        if has_vmap(self.graph):  # its nodes stand for one of a batch each, and are taken apart together
            return decompose(self, table, *args, **options)
        replace_equivalents(self.graph)
        replace_writes(self.graph)
        decompose_alone(self.graph, table)
        return decompose(self, table, *args, **options) if needs_decomposition(self.graph, table) else self

    program.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        program.run_decompositions = decompose  # type: ignore[method-assign]


def solve_without_pivots(matrix: Any, right: Any, *, left: bool = True) -> Any:
    """Solve ``A X = B`` (``X A = B`` unless ``left``) by eliminating rows, for which ONNX has operators.

    Every pivot is the diagonal's, which is enough for ``I ± S`` with a skew-symmetric ``S``: its leading minors are at
    least 1. Orthogonal adapters (BOFT, OFT, PSOFT) solve no other systems.

    Args:
        matrix: float ``[…, n, n]``.
        right: float ``[…, n, m]``.
        left: whether the matrix stands on the left.
    """
    import torch

    rows = torch.cat([matrix, right] if left else [matrix.mT, right.mT], dim=-1)
    size = int(matrix.shape[-1])
    for at in range(size):
        pivot = rows[..., at : at + 1, :] / rows[..., at : at + 1, at : at + 1]
        others = rows - rows[..., :, at : at + 1] * pivot
        rows = torch.cat([others[..., :at, :], pivot, others[..., at + 1 :, :]], dim=-2)
    return rows[..., size:] if left else rows[..., size:].mT


def standard_deviation(values: Any, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Any:
    """Return the standard deviation over dims, by operators of ATen; torch's own decomposition holds some of prims.

    Args:
        values: float, of any shape.
        dim: list of dims; empty or None: all.
        unbiased: whether it is divided by one less than the number of values.
        keepdim: whether the result has the dims, of size 1.
    """
    dims = list(dim or range(values.ndim))
    squares = (values - values.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim)
    return (squares / (math.prod(values.shape[one] for one in dims) - int(unbiased))).sqrt()


OWN = {"linalg_solve.default": solve_without_pivots, "std.dim": standard_deviation}
"""Decompositions of operators of ATen beside torch's."""


def replace_equivalents(graph: Any) -> None:
    """Replace operators of a captured `torch.fx.Graph` by those with the same values that have a form in ONNX."""
    from torch import ops

    equivalents = {operator(name): operator(other) for name, other in EQUIVALENTS.items()}
    conversions = {operator(name) for name in CONVERSIONS}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in equivalents:
            node.target = equivalents[node.target]
        elif node.target in conversions:
            source, dtype = node.args[0], node.meta["val"].dtype
            same = source.meta["val"].dtype == dtype
            node.target = ops.aten.alias.default if same else ops.aten._to_copy.default
            node.args, node.kwargs = (source,), {} if same else {"dtype": dtype}
        elif node.target is ops.aten.numpy_T.default and node.args[0].meta["val"].ndim == 2:
            node.target, node.args = ops.aten.transpose.int, (node.args[0], 0, 1)


def decompose_alone(graph: Any, table: Mapping[Any, Any]) -> None:
    """Replace each operator of a captured `torch.fx.Graph` that has a decomposition by the operators of it.

    Args:
        graph: the graph.
        table: operators that have no form in ONNX, with their decompositions.
    """
    from torch._guards import detect_fake_mode
    from torch._ops import OpOverload

    mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes if node.op == "placeholder"])
    for node in list(graph.nodes):
        if mode is not None and isinstance(node.target, OpOverload) and node.target in table:
            _decompose_node(graph, node, mode, table)


def _decompose_node(graph: Any, node: Any, mode: Any, table: Mapping[Any, Any]) -> None:
    """Replace a node by its decomposition; one with arguments or results other than tensors stays."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.node import map_arg

    inputs = node.all_input_nodes
    values = [each.meta.get("val") for each in (*inputs, node)]
    if node.target._schema.is_mutable or not all(isinstance(value, torch.Tensor) for value in values):
        return

    def run(*tensors: Any) -> Any:
        by_node = dict(zip(inputs, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), by_node.__getitem__)
        return table[node.target](*args, **kwargs)  # the operator itself may be taken apart before a table is asked

    with mode:
        traced = make_fx(run, decomposition_table=dict(table))(*values[:-1]).graph
    if any(each.op == "get_attr" or _is_view_of_prims(each.target) for each in traced.nodes):
        return
    placeholders = [each for each in traced.nodes if each.op == "placeholder"]
    before = set(graph.nodes)
    with graph.inserting_before(node):
        result = graph.graph_copy(traced, dict(zip(placeholders, inputs, strict=True)))
    for each in graph.nodes:
        if each not in before:
            each.meta.update({key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")})
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    result.name = node.name  # the program's signature names its outputs


def _is_view_of_prims(target: Any) -> bool:
    """Return whether an operator is a view that is none of ATen, which no program may hold that is traced again."""
    schema = getattr(target, "_schema", None)
    return (
        schema is not None
        and schema.name.startswith("prims::")
        and any(each.alias_info is not None for each in schema.returns)
    )


def has_vmap(graph: Any) -> bool:
    """Return whether a captured graph holds calls of ``torch.vmap`` (EmbeddingGemma), for which ONNX has no form."""
    return any(getattr(node.target, "__module__", "") == "torch._functorch.predispatch" for node in graph.nodes)


def needs_decomposition(graph: Any, table: Mapping[Any, Any]) -> bool:
    """Return whether a graph holds an operator that the exporter cannot translate as it is.

    Args:
        graph: a captured `torch.fx.Graph`.
        table: operators that have no form in ONNX, with their decompositions.
    """
    import torch
    from torch._decomp import decomposition_table
    from torch._ops import HigherOrderOperator, OpOverload

    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    views = {operator(name) for name in VIEWS}
    decided = {*torch.export.default_decompositions(), *decomposition_table}  # if it is not in the table, it has a form
    for node in graph.nodes:
        target = node.target
        if isinstance(target, HigherOrderOperator):
            return True
        if isinstance(target, OpOverload):
            unknown = target not in decided and target not in views and target.has_kernel_for_dispatch_key(composite)
            if target in table or target._schema.is_mutable or unknown:
                return True
    return False
