# SPDX-License-Identifier: Apache-2.0
"""INT32_MAX as an index is deliberately out of range: a scatter drops the write, a gather reads anything (§6.7).

ONNX Runtime refuses such an index, so gathers read slot 0 instead, and scatters get only the rows with other indices.
Other indices out of range remain errors, as they are errors of the model. Nodes whose indices are constants without
INT32_MAX are not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..graph import STANDARD, nodes_of, opset_of, subgraphs, value_types
from ..weights import Weight

NO_INDEX = 2**31 - 1
_GATHERS = ("Gather", "GatherElements", "GatherND")
_SCATTERS = ("ScatterElements", "ScatterND")
_DTYPES = {int(onnx.TensorProto.INT32): np.int32, int(onnx.TensorProto.INT64): np.int64}
_INT32 = int(onnx.TensorProto.INT32)
_NAME = "sim.index"
_CONSTANTS: dict[str, np.ndarray[Any, Any]] = {
    "none32": np.array(NO_INDEX, np.int32),
    "none64": np.array(NO_INDEX, np.int64),
    "zero32": np.array(0, np.int32),
    "zero64": np.array(0, np.int64),
    "first": np.array([0], np.int64),
    "last": np.array([-1], np.int64),
    "end": np.array([2**63 - 1], np.int64),
    "line": np.array([1, -1], np.int64),
}


def guard(model: Any, types: Mapping[str, int], weights: Sequence[Weight]) -> None:
    """Replace INT32_MAX indices in a graph and its subgraphs, in place.

    Args:
        model: ModelProto without functions, on which shape inference has run.
        types: element type of the main graph's values.
        weights: the streamed weights; large constant indices are among them.
    """
    clean = {w.name for w in weights if w.data_type in _DTYPES and not _contains_no_index(w)}
    _Guard(opset_of(model)).apply(model.graph, clean, types)
    used = {name for node in nodes_of(model.graph) for name in node.input if name.startswith(_NAME)}
    constants = {f"{_NAME}.{key}": value for key, value in _CONSTANTS.items()}
    model.graph.initializer.extend(numpy_helper.from_array(v, key) for key, v in constants.items() if key in used)


def _contains_no_index(weight: Weight) -> bool:
    dtype = _DTYPES[weight.data_type]
    return any(bool(np.any(np.frombuffer(chunk, dtype) == NO_INDEX)) for chunk in weight.chunks())


class _Guard:
    def __init__(self, opset: int) -> None:
        self.opset, self.count = opset, 0
        # by the name of indices: those in which INT32_MAX is replaced, for gathers
        self.safe: dict[str, str] = {}
        # and by the axis too: those without it, and the rows that they stood in, for scatters
        self.rows: dict[tuple[str, int | None], tuple[str, str]] = {}

    def apply(self, graph: Any, clean: set[str], types: Mapping[str, int]) -> None:
        """Guard a graph and its subgraphs; nodes with the same indices share what is computed of them."""
        outer = self.safe, self.rows
        self.safe, self.rows = dict(self.safe), dict(self.rows)  # a subgraph sees values of the outer graph
        try:
            self._apply(graph, clean | _constants_in_range(graph), types)
        finally:
            self.safe, self.rows = outer

    def _apply(self, graph: Any, clean: set[str], types: Mapping[str, int]) -> None:
        flat = _vectors(graph)
        nodes = list(graph.node)
        del graph.node[:]
        for node in nodes:
            for inner in subgraphs(node):
                self.apply(inner, clean, value_types(inner, types))
            if node.domain not in STANDARD or node.op_type not in (*_GATHERS, *_SCATTERS) or node.input[1] in clean:
                graph.node.append(node)
            elif node.op_type in _GATHERS:
                graph.node.extend(self._gather(node, types))
            elif node.op_type == "ScatterND" and node.input[1] in flat:
                # a single row of indices: if it is dropped, nothing is written; no exporter emits such a node
                graph.node.append(node)
            else:
                graph.node.extend(self._scatter(node, types))

    def _add(self, op: str, inputs: list[str], **attributes: Any) -> Any:
        """Return a node with one new output; inputs that start with a dot are helper constants."""
        self.count += 1
        names = [_NAME + name if name.startswith(".") else name for name in inputs]
        return helper.make_node(op, names, [f"{_NAME}.{self.count}.{op}"], **attributes)

    def _gather(self, node: Any, types: Mapping[str, int]) -> Iterator[Any]:
        indices = node.input[1]
        if indices not in self.safe:
            kind = "32" if types.get(indices) == _INT32 else "64"
            yield (invalid := self._add("Equal", [indices, f".none{kind}"]))
            yield (safe := self._add("Where", [invalid.output[0], f".zero{kind}", indices]))
            self.safe[indices] = safe.output[0]
        node.input[1] = self.safe[indices]
        yield node

    def _scatter(self, node: Any, types: Mapping[str, int]) -> Iterator[Any]:
        """Yield nodes up to a ScatterND of the rows (for ScatterElements: elements) whose index is not INT32_MAX."""
        data, indices, updates = node.input
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0) if node.op_type == "ScatterElements" else None
        if (indices, axis) not in self.rows:
            yield from self._rows(indices, axis, types)
        to, rows = self.rows[indices, axis]
        yield (valid_updates := self._add("GatherND", [updates, rows]))
        reduction = {a.name: a.s.decode() for a in node.attribute if a.name == "reduction"}
        yield helper.make_node(
            "ScatterND", [data, to, valid_updates.output[0]], list(node.output), name=node.name, **reduction
        )

    def _rows(self, indices: str, axis: int | None, types: Mapping[str, int]) -> Iterator[Any]:
        """Yield nodes that compute the indices without INT32_MAX, as ScatterND takes them, and their rows.

        Args:
            indices: of a ScatterElements along an axis, or of a ScatterND.
            axis: None for a ScatterND.
            types: element types of values.
        """
        given = indices
        if types.get(indices) == _INT32:
            yield (wide := self._add("Cast", [indices], to=onnx.TensorProto.INT64))
            indices = wide.output[0]
        highest = indices
        if axis is None:
            axes: dict[str, Any] = {} if self.opset >= 18 else {"axes": [-1]}
            inputs = [indices] if axes else [indices, ".last"]
            yield (high := self._add("ReduceMax", inputs, keepdims=0, **axes))
            highest = high.output[0]
        yield (valid := self._add("Less", [highest, ".none64"]))
        yield (places := self._add("NonZero", [valid.output[0]]))
        yield (rows := self._add("Transpose", [places.output[0]], perm=[1, 0]))
        yield (slots := self._add("GatherND", [indices, rows.output[0]]))
        to = slots.output[0]
        if axis is not None:
            for step in self._coordinates(places.output[0], to, axis):
                yield step
                to = step.output[0]
        self.rows[given, axis] = to, rows.output[0]

    def _coordinates(self, places: str, slots: str, axis: int) -> Iterator[Any]:
        """Yield nodes that compute the coordinates in the data: those of the element, with the slot on `axis`."""
        bounds = {f"{_NAME}.{self.count}.axis{i}": np.array([axis + i], np.int64) for i in (0, 1)}
        before_end, after_start = bounds
        for name, value in bounds.items():
            yield helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        yield (before := self._add("Slice", [places, ".first", before_end, ".first"]))
        last = ".end" if axis == -1 else after_start
        yield (after := self._add("Slice", [places, last, ".end", ".first"]))
        yield (line := self._add("Reshape", [slots, ".line"]))
        lines = [before.output[0], line.output[0], after.output[0]]
        yield (together := self._add("Concat", lines, axis=0))
        yield self._add("Transpose", [together.output[0]], perm=[1, 0])


def _constants_in_range(graph: Any) -> set[str]:
    """Return the names of the constants of a graph that contain no INT32_MAX."""
    tensors = {t.name: t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
    attributes = set()
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                tensors[node.output[0]] = attribute.t
            elif attribute.name in ("value_int", "value_ints") and NO_INDEX not in (attribute.i, *attribute.ints):
                attributes.add(node.output[0])
    clean = {n for n, t in tensors.items() if t.data_type in _DTYPES and not np.any(_array(t) == NO_INDEX)}
    return attributes | clean


def _array(tensor: Any) -> Any:
    return numpy_helper.to_array(tensor)


def _vectors(graph: Any) -> set[str]:
    """Return the names of the values that have one dim, according to shape inference."""
    return {
        info.name
        for info in (*graph.input, *graph.value_info)
        if info.type.tensor_type.HasField("shape") and len(info.type.tensor_type.shape.dim) == 1
    } | {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
