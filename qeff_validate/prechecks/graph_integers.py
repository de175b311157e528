# SPDX-License-Identifier: Apache-2.0
"""The integers that an ONNX file's weights are stored in, so that they can be emulated in the original model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qeff_validate.config.file_precision import IntegerFormat

FUSED = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4",
    "MatMulIntegerToFloat", "QAttention", "QEmbedLayerNormalization", "QGemm", "QLinearConv", "QLinearMatMul",
})  # fmt: skip
"""Operators with integers whose formats are not read."""

HALF, HALF_RANGE = 7, 128
"""Bits of numbers whose greatest and smallest are at most so far apart."""


def integers_of(graph: Any) -> IntegerFormat | None:
    """Return the format of all integer weights of a graph; None if they differ, or if one is not known.

    Args:
        graph: a GraphProto, whose external data need not be loaded.
    """
    if any(node.op_type in FUSED or node.op_type == "QuantizeLinear" for node in graph.node):
        return None  # activations by scales that somebody has calibrated are no property of the model
    weights = _Weights(graph)
    formats, attention = list(weights), weights.attention()
    if not formats or None in formats or attention is None:
        return None
    known = [entry for entry in formats if entry is not None]
    products = [entry for entry in known if entry.products] or known
    widest = max(products, key=lambda entry: entry.bits)  # the numbers of a weight may be small by chance
    same = {replace(entry, bits=8 if entry.bits == HALF else entry.bits, tables=False) for entry in products}
    tables = any(entry.tables for entry in known)
    return replace(widest, tables=tables, attention=attention) if len(same) == 1 else None


class _Weights:
    """Yields the format of each integer weight of a graph; None for one that is not known."""

    def __init__(self, graph: Any) -> None:
        from qeff_validate.builders.onnx_patterns import consumers, producers

        self._graph = graph
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._producer, self._readers = producers(graph), consumers(graph)

    def __iter__(self) -> Iterator[IntegerFormat | None]:
        from onnx import TensorProto

        kinds = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
        self._bits: Mapping[int, int] = {
            getattr(TensorProto, name): bits for name, bits in kinds.items() if hasattr(TensorProto, name)
        }
        self._unsigned = {getattr(TensorProto, name, -1) for name in ("UINT8", "UINT4", "UINT2")}
        for node in self._graph.node:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            if node.op_type == "MatMulNBits":
                zero_points = len(node.input) > 3 and bool(node.input[3])
                yield IntegerFormat(attributes.get("bits", 4), not zero_points, block=attributes.get("block_size", 0))
            elif node.op_type == "MatMulInteger" and not self._is_dynamic(node.input[1]):
                scales = self._scales_behind(node) if self._is_dynamic(node.input[0]) else None
                yield None if scales is None else self._format(node.input[1], scales, activations=True)
            elif node.op_type == "DequantizeLinear" and self._table(node.input[0]) is not None:
                yield self._of_dequantized(node, attributes)

    def attention(self) -> bool | None:
        """Return whether products of two activations quantize both; None if some do and others do not."""
        products = [node for node in self._graph.node if node.op_type in ("MatMul", "MatMulInteger")]
        quantized = {
            node.op_type == "MatMulInteger" and self._is_dynamic(node.input[0])
            for node in products
            if node.input[1] not in self._stored
        }
        return None if len(quantized) > 1 else quantized == {True}

    def _is_dynamic(self, name: str) -> bool:
        """Return whether a value is made of an activation as it is met."""
        source = self._producer.get(name)
        return source is not None and source.op_type == "DynamicQuantizeLinear"

    def _of_dequantized(self, node: Any, attributes: Mapping[str, int]) -> IntegerFormat | None:
        """Return the format of a weight that is dequantized before it is read, or whose rows are."""
        name = self._table(node.input[0])
        assert name is not None
        rows = name != node.input[0] or any(
            reader.op_type == "Gather" for reader in self._readers.get(node.output[0], ())
        )
        block = attributes.get("block_size", 0)
        found = self._format(name, [node.input[1]], block=block)
        return None if found is None else replace(found, products=not rows, tables=rows)

    def _table(self, name: str) -> str | None:
        """Return the integer weight that a value is, or is gathered from; None if it is none."""
        node = self._producer.get(name)
        name = node.input[0] if node is not None and node.op_type == "Gather" else name
        tensor = self._stored.get(name)
        return name if tensor is not None and tensor.data_type in self._bits and len(tensor.dims) > 1 else None

    def _scales_behind(self, node: Any) -> list[str] | None:
        """Return the names of the constant scales of a sum of products; None if there is no cast and product."""
        for cast in self._readers.get(node.output[0], ()):
            for product in self._readers.get(cast.output[0], ()) if cast.op_type == "Cast" else ():
                if product.op_type == "Mul":
                    others = [name for name in product.input if name != cast.output[0]]
                    inner = [self._producer[name] for name in others if name in self._producer]
                    return [*others, *(name for scale in inner if scale.op_type == "Mul" for name in scale.input)]
        return None

    def _format(self, name: str, scales: list[str], **fields: Any) -> IntegerFormat | None:
        tensor = self._stored.get(name)
        if tensor is None or tensor.data_type not in self._bits:
            return None
        bits = self._bits[tensor.data_type]
        sizes = [math.prod(self._stored[scale].dims) for scale in scales if scale in self._stored]
        return IntegerFormat(
            bits - (bits == 8 and _half_range(tensor)),
            tensor.data_type not in self._unsigned,
            per_channel=any(size > 1 for size in sizes) and not fields.get("block"),
            **fields,
        )


def _half_range(tensor: Any) -> bool:
    """Return whether a tensor's numbers need seven bits only; False if they are not in the file."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL:
        return False
    array = numpy_helper.to_array(tensor)
    return array.size > 0 and int(array.max()) - int(array.min()) <= HALF_RANGE
