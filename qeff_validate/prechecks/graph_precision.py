# SPDX-License-Identifier: Apache-2.0
"""The precision that an ONNX file computes in, read from the operand types of its matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qeff_validate.config.case import Precision
from qeff_validate.config.file_precision import FilePrecision, IntegerFormat, integer_format
from qeff_validate.prechecks.graph_integers import integers_of

Compute = Literal["fp32", "fp16", "bf16"]
COMPUTE: tuple[Compute, ...] = ("fp32", "fp16", "bf16")
"""From the least rounding to the most."""

WORDS: Mapping[str, str] = {"fp16": "float16", "bf16": "bfloat16"}

PRODUCTS = frozenset({
    "Attention", "Conv", "ConvTranspose", "Einsum", "EmbedLayerNormalization", "FusedConv", "FusedGemm", "FusedMatMul",
    "GRU", "Gemm", "GroupQueryAttention", "LSTM", "MatMul", "MultiHeadAttention",
})  # fmt: skip
"""Operators that multiply activations with weights or with each other."""

MOVES = frozenset({
    "Cast", "Concat", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that copy numbers of their input, so that a widening cast does not undo a rounding."""

INTEGER_PRODUCTS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention",
    "QEmbedLayerNormalization", "QGemm", "QLinearConv", "QLinearMatMul",
})  # fmt: skip

BLOCKS: Mapping[str, int] = {"GatherBlockQuantized": 4, "MatMulBnb4": 4, "MatMulFpQ4": 4, "MatMulNBits": 4}
"""Operators of ONNX Runtime with block-quantized weights, and their default number of bits."""


@dataclass(frozen=True, slots=True)
class GraphPrecision:
    """The precision that an ONNX file computes in.

    Attributes:
        compute: the coarsest floating type for which at least half of the products read it or a coarser one; fewer
            products in a coarser type do not define the file's precision, but may be a fault.
        weights: ``int8`` or ``int4`` if weights or activations are quantized to integers, or ``fp8``; None: neither.
        where: the number of products for each operand type, for messages; empty if all are float32.
        integers: the format of ``weights``; None: there are none, or they have several, or one that is not emulated.
    """

    compute: Compute = "fp32"
    weights: str | None = None
    where: str = ""
    integers: IntegerFormat | None = None

    @property
    def words(self) -> str:
        """The precision in words, for messages."""
        parts = [WORDS.get(self.compute, ""), self.weights or ""]
        return " and ".join(filter(None, parts)) or "float32"


def combined(asked: Precision, file: GraphPrecision) -> Precision:
    """Return the precision of a file on a runtime that computes in a precision: the coarser of both.

    Weights that a compiler compresses once more are noisier by that alone, so the file's own are not named beside them.
    """
    compute = COMPUTE[max(COMPUTE.index(asked.compute), COMPUTE.index(file.compute))]
    weights = "+".join(filter(None, (asked.weights, file.weights))) or None
    if (compute, weights) == (asked.compute, asked.weights):
        return asked
    integers = file.integers if asked.weights is None else None
    return FilePrecision(
        compute=compute, weights=weights, kv=asked.kv, beyond_range=asked.beyond_range, integers=integers
    )


def measurable(precision: Precision) -> bool:
    """Return whether the original model can be run in a precision, so that its noise can be measured."""
    return precision.weights in (None, "mxfp6") or integer_format(precision) is not None


def graph_precision(path: Path) -> GraphPrecision:
    """Read the precision of an ONNX file; float32 if it cannot be read, since the runtime will say what is wrong."""
    try:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            from onnx.inliner import inline_local_functions

            model = inline_local_functions(model)
        return precision_of(model)
    except Exception:  # protobuf's errors depend on its implementation
        return GraphPrecision()


def precision_of(model: Any) -> GraphPrecision:
    """Return the precision of a loaded ONNX model without local functions."""
    reader = _Reader()
    reader.read(model.graph, {}, {})
    weights = f"int{reader.bits}" if reader.bits else "fp8" if reader.eights else None
    total = sum(reader.products.values())
    coarser = {name: sum(reader.products.get(other, 0) for other in COMPUTE[at:]) for at, name in enumerate(COMPUTE)}
    compute = [name for name in COMPUTE if 2 * coarser[name] >= total][-1] if total else "fp32"
    parts = [
        f"{reader.products[name]} of {total} products in {WORDS[name]}" for name in WORDS if name in reader.products
    ]
    parts += [f"{count} {name}" for name, count in sorted(reader.integers.items())]
    return GraphPrecision(compute, weights, ", ".join(parts), integers_of(model.graph) if reader.bits else None)


class _Reader:
    """Follows types through a graph in the order of its nodes."""

    def __init__(self) -> None:
        from onnx import TensorProto

        self._floats: Mapping[int, Compute] = {
            TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16",
        }  # fmt: skip
        self._float = TensorProto.FLOAT
        self._bits = {
            getattr(TensorProto, name): bits
            for name, bits in (("INT8", 8), ("UINT8", 8), ("INT4", 4), ("UINT4", 4), ("INT2", 2), ("UINT2", 2))
            if hasattr(TensorProto, name)
        }
        self._eights = {value for name, value in TensorProto.DataType.items() if name.startswith("FLOAT8")}
        self.products: dict[str, int] = {}
        """Number of products by the coarsest precision of their operands."""
        self.integers: dict[str, int] = {}
        self.bits = 0
        """Width of the narrowest integers that weights are stored in; 0: none."""
        self.eights = False

    def coarsest(self, precisions: Iterable[str]) -> Compute:
        """Return the precision with the most rounding; ``fp32`` of none."""
        known = [name for name in COMPUTE if name in set(precisions)]
        return known[-1] if known else "fp32"

    def read(self, graph: Any, types: Mapping[str, int], rounded: Mapping[str, Compute]) -> dict[str, int]:
        """Read a graph or a branch of one, and return the types of all its values.

        Args:
            graph: a GraphProto.
            types: element types of the values of the enclosing graph.
            rounded: the coarsest precision that each of these values has been rounded to.
        """
        known = dict(types) | {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.elem_type:
                known.setdefault(value.name, value.type.tensor_type.elem_type)
        rounded_to = dict(rounded) | {name: self._floats[kind] for name, kind in known.items() if kind in self._floats}
        for value in (*graph.value_info, *graph.output):  # what is rounded on the way there is not known yet
            rounded_to.pop(value.name, None)
        for node in graph.node:
            self._node(node, known, rounded_to)
        return known

    def _node(self, node: Any, known: MutableMapping[str, int], rounded_to: MutableMapping[str, Compute]) -> None:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        inputs = [name for name in node.input if name]
        inner: dict[str, int] = {}
        for attribute in node.attribute:
            for branch in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                inner |= self.read(branch, known, rounded_to)
        kind = self._kind(node, attributes, known)
        if node.op_type in PRODUCTS:
            read = [rounded_to[name] for name in inputs if name in rounded_to]
            compute = self.coarsest([*read, *([self._floats[kind]] if kind in self._floats else [])])
            self.products[compute] = self.products.get(compute, 0) + 1
        self._integers(node, attributes, known)
        for name in filter(None, node.output):
            element_type = known.setdefault(name, kind) if kind else known.get(name, 0)
            if element_type in self._floats:
                before = [rounded_to[inputs[0]]] if node.op_type in MOVES and inputs and inputs[0] in rounded_to else []
                rounded_to[name] = self.coarsest([self._floats[element_type], *before])

    def _kind(self, node: Any, attributes: Mapping[str, Any], known: Mapping[str, int]) -> int:
        """Return the element type of a node's first output; 0 if it is not known."""
        kinds = [known[name] for name in node.input if name in known]
        if node.op_type == "Cast":
            return int(attributes["to"].i)
        if node.op_type in ("Constant", "ConstantOfShape"):
            value = attributes.get("value")
            return int(value.t.data_type) if value is not None else self._float
        if node.op_type in ("DequantizeLinear", "CastLike"):
            return known.get(node.input[1], self._float)
        if node.op_type in ("Shape", "Size", "NonZero", "ArgMax", "QuantizeLinear", "DynamicQuantizeLinear"):
            return 0
        return next((kind for kind in kinds if kind in self._floats), kinds[0] if kinds else 0)

    def _integers(self, node: Any, attributes: Mapping[str, Any], known: Mapping[str, int]) -> None:
        """Record a node that computes with integers or reads weights that are stored in them."""
        bits = 0
        if node.op_type in BLOCKS:
            bits = int(attributes["bits"].i) if "bits" in attributes else BLOCKS[node.op_type]
        elif node.op_type in INTEGER_PRODUCTS or node.op_type == "DynamicQuantizeLinear":
            bits = 8
        elif node.op_type == "DequantizeLinear":
            kind = known.get(node.input[0], 0)
            bits = self._bits.get(kind, 0)
            if kind in self._eights:
                self.eights = True
            if not bits and kind not in self._eights:
                return
        else:
            return
        self.integers[node.op_type] = self.integers.get(node.op_type, 0) + 1
        if bits:
            self.bits = bits if not self.bits else min(bits, self.bits)
