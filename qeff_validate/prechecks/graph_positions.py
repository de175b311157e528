# SPDX-License-Identifier: Apache-2.0
"""Finds the row of the position table that a user's ONNX graph reads for the first token; loads no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.models.adapters.files import DTYPES
from qeff_validate.models.sources.embedding_tables import POSITIONS, header
from qeff_validate.tensors import Array

MOST_NODES = 200
"""Most nodes between token ids and positions; exporters write some twenty."""

TOKENS = 3
"""Number of tokens of the row that the positions are computed for."""

CONTROL = frozenset({"If", "Loop", "Scan"})
"""Operators with subgraphs; neither they nor local functions are evaluated."""


@dataclass(frozen=True, slots=True)
class GraphPositions:
    """How a graph reads the table of positions.

    Attributes:
        begins: row of the model's table for the first token.
        rows: rows of the model's table that are in the graph, counted from the model's first row.
    """

    begins: int
    rows: int


def graph_positions(onnx_file: Path, files: Sequence[Path], ids: str, mask: str, first: int) -> GraphPositions | None:
    """Find the model's table of positions in a graph, bit for bit, and compute the row of the first token.

    Args:
        onnx_file: the graph.
        files: the model's safetensors files.
        ids: the graph's name for ``input_ids``.
        mask: the graph's name for ``attention_mask``.
        first: the model's row of the first token; the graph's table may begin there.

    Returns:
        None if the graph does not have the table unchanged, or if its index cannot be computed.
    """
    import onnx

    table = _table(files)
    if table is None:
        return None
    model = onnx.load(str(onnx_file), load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] not in constants:
            continue
        start = _start(constants[node.input[0]], onnx_file.parent, table, first)
        if start is None:
            continue
        row = _first_index(model, node.input[1], {ids: _ids(), mask: np.ones((1, TOKENS), np.int64)})
        return None if row is None else GraphPositions(start + row, start + constants[node.input[0]].dims[0])
    return None


def _table(files: Sequence[Path]) -> Array | None:
    """Return the float32 table of positions in safetensors files; None unless there is exactly one."""
    tables = []
    for file in files:
        entries, start = header(file)
        for name, entry in entries.items():
            if POSITIONS.fullmatch(name) and entry["dtype"] == "F32" and len(entry["shape"]) == 2:
                offset = start + entry["data_offsets"][0]
                tables.append(np.memmap(file, DTYPES["F32"], "r", offset, tuple(entry["shape"])))
    return tables[0] if len(tables) == 1 else None


def _start(tensor: Any, folder: Path, table: Array, first: int) -> int | None:
    """Return the row of the model's table at which a graph's tensor begins; None if it is another tensor."""
    from onnx import TensorProto, external_data_helper, numpy_helper

    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or tensor.dims[1] != table.shape[1]:
        return None
    if tensor.data_location == TensorProto.EXTERNAL:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    array = numpy_helper.to_array(tensor)
    for start in dict.fromkeys((0, first)):
        if np.array_equal(array, table[start : start + len(array)]):
            return start
    return None


def _ids() -> Array:
    return np.arange(5, 5 + TOKENS, dtype=np.int64)[None]


def _first_index(model: Any, name: str, rows: Mapping[str, Array]) -> int | None:
    """Compute the first element of a value that depends on token ids, mask and positions alone."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    nodes = _ancestors(model.graph, name)
    if nodes is None:
        return None
    needed = {value for node in nodes for value in node.input} | {name}
    inputs = [info for info in model.graph.input if info.name in needed]
    rows = {**rows, "position_ids": np.arange(TOKENS, dtype=np.int64)[None]}
    if any(info.name not in rows for info in inputs):
        return None
    feeds = {}
    for info in inputs:
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        dims = [dim.dim_value or None for dim in info.type.tensor_type.shape.dim]
        shape = [fixed or size for fixed, size in zip(dims, (1, TOKENS), strict=True)]
        feeds[info.name] = np.resize(rows[info.name], shape).astype(dtype)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    graph = helper.make_graph(nodes, "positions", inputs, [helper.make_empty_tensor_value_info(name)], constants)
    try:
        (index,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import)).run(None, feeds)
        return int(np.asarray(index).flat[0])
    except Exception:  # it raises whatever numpy does; the runtime will say what is wrong with the graph
        return None


def _ancestors(graph: Any, name: str) -> list[Any] | None:
    """Return the nodes that compute a value, in order; None if there are too many, or one is no plain operator."""
    wanted, nodes = {name}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(node.input)
            if len(nodes) > MOST_NODES or node.op_type in CONTROL or node.domain not in ("", "ai.onnx"):
                return None
    return nodes[::-1]
