# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph in float64, so that the effect of a fault in a graph is measured without the noise of float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import erf
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qeff_validate.runtimes.retained_state import RetainedState
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec, check_feeds, undefined, wanted_outputs


def float64_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which everything in float32 is float64: weights, constants, casts, inputs and outputs.

    Constants keep their float32 rounding (an epsilon, the root of 2), and casts to fp16 round as before. The copy is
    for `onnx.reference` alone: the standard does not define every operator for float64.

    Args:
        model: weights included.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen(wide.graph)
    for function in wide.functions:
        del function.value_info[:]
        _widen_nodes(function.node)
    return wide


def _widen(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    _widen_nodes(graph.node)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for entry in node.attribute:
            if entry.name in ("to", "dtype") and entry.i == TensorProto.FLOAT:
                entry.i = TensorProto.DOUBLE
            elif entry.name in ("value_float", "value_floats"):
                value = np.array(helper.get_attribute_value(entry), dtype=np.float64)
                entry.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))
            elif entry.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(entry.t)
            elif entry.type == onnx.AttributeProto.GRAPH:
                _widen(entry.g)


class Erf(OpRun):
    """The error function in the dtype of its input; `onnx.reference` rounds it to float32."""

    def _run(self, x: Array) -> tuple[Array]:
        values = np.fromiter(map(erf, x.ravel().tolist()), dtype=np.float64, count=x.size)
        return (values.reshape(x.shape).astype(x.dtype),)


class Cast(OpRun):
    """A cast that rounds to float32 before it truncates to integers: 1.9999999 is a 2 up to a constant's rounding."""

    def _run(self, x: Array, to: int, **_: Any) -> tuple[Array]:
        dtype = helper.tensor_dtype_to_np_dtype(to)
        truncates = x.dtype == np.float64 and np.issubdtype(dtype, np.integer)
        return ((x.astype(np.float32) if truncates else x).astype(dtype),)


class GatherElements(OpRun):
    """The operator with indices smaller than the data along other axes, which `onnx.reference` rejects."""

    def _run(self, data: Array, indices: NDArray[np.int64], axis: int = 0) -> tuple[Array]:
        region = [slice(size) for size in indices.shape]
        region[axis] = slice(None)
        return (np.take_along_axis(data[tuple(region)], indices, axis),)


class Float64Session:
    """A `Session` that runs a graph in float64 in the reference evaluator; its outputs and its state are float64.

    A random body of the configs takes 0.02 to 0.2 s for 8 rows of 24 tokens, experts 0.6 s.

    Args:
        model: a graph in float32, weights included; it is not changed.
        buckets: values of symbols that the shapes of the feeds do not determine, such as ``ctx_len``.
    """

    shapes: tuple[Shapes, ...] = ()

    def __init__(self, model: onnx.ModelProto, buckets: Sequence[Mapping[str, int]] = ()) -> None:
        self.inputs: tuple[TensorSpec, ...] = tuple(map(_spec, model.graph.input))
        self.outputs: tuple[TensorSpec, ...] = tuple(map(_spec, model.graph.output))
        self._evaluator: Any = ReferenceEvaluator(float64_graph(model), new_ops=[Cast, Erf, GatherElements])
        self._state: RetainedState[Array] = RetainedState(
            self.inputs, self.outputs, buckets, make=undefined, shape=lambda value: value.shape
        )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once, with the feeds of the float32 graph."""
        symbols = check_feeds(feeds, self.inputs, optional=tuple(self._state.twins))
        inputs = {**feeds, **self._state.values(feeds, symbols)}
        wide = {
            name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in inputs.items()
        }
        names = [spec.name for spec in self.outputs]
        with np.errstate(all="ignore"):  # values that a mask drops later may be infinite
            outputs: dict[str, Array] = dict(zip(names, self._evaluator.run(names, wide), strict=True))
        self._state.keep(outputs)
        return {name: outputs[name].copy() for name in wanted_outputs(self.outputs, fetch)}

    def reset(self) -> None:
        """Forget retained state."""
        self._state.reset()


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor_type = value.type.tensor_type
    dims = (dim.dim_param or dim.dim_value for dim in tensor_type.shape.dim)
    return TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor_type.elem_type).name, tuple(dims))
