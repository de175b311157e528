# SPDX-License-Identifier: Apache-2.0
"""Operators outside the ONNX standard in a graph, and the tools that write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..graph import STANDARD, nodes_of

QUALCOMM = ("com.qualcomm.cloud", "com.qti.aisw.onnx")
MICROSOFT = "com.microsoft"
ACCEPTED = frozenset({(MICROSOFT, "MatMulNBits")})
"""Contrib operators that clients compile for cards (card-contract §6.7)."""

_OPTIMIZER = (
    "made by ONNX Runtime's optimizer (a model that was saved with optimization level extended or all), by"
    " onnxruntime.transformers or by Optimum's ORTOptimizer: save the graph without optimization, or with level basic"
)
_QUANTIZER = (
    "made by onnxruntime.quantization or Optimum's ORTQuantizer: quantize in the QDQ format, without operators of"
    " ONNX Runtime's own, or give the graph before quantization"
)
_LAYOUT = (
    "made by ONNX Runtime's optimizer for the processor that it ran on (level layout or all): save the graph with"
    " level basic"
)
_EXPORTER = (
    "made by PyTorch's exporter where it has no ONNX operator: export with a newer torch, or replace the operation"
)
_MAKERS: Mapping[str, str] = {
    "com.microsoft.nchwc": _LAYOUT,
    "com.ms.internal.nhwc": _LAYOUT,
    "ai.onnx.contrib": "made by onnxruntime-extensions (tokenizers, pre- and postprocessing): leave them out",
    "ai.onnx.ml": "made by converters of classical models, such as skl2onnx or tf2onnx: a card has no such operators",
    "aten": _EXPORTER,
    "org.pytorch.aten": _EXPORTER,
    "pkg.torch": _EXPORTER,
    "trt.plugins": "made for TensorRT: export without its plugins",
}
_CUSTOM = "a custom operator: export the model with standard operators, or as an ONNX function of standard operators"
_QUANTIZED = ("Quant", "QLinear", "QAttention", "QEmbed", "QGemm", "QOrdered", "Integer", "NBits", "Bnb4", "QMoE")


def maker(domain: str, operator: str) -> str:
    """Return the tool that writes an operator of another domain, and a remedy."""
    if domain == MICROSOFT:
        return _QUANTIZER if any(part in operator for part in _QUANTIZED) else _OPTIMIZER
    return next((text for name, text in _MAKERS.items() if domain == name or domain.startswith(f"{name}.")), _CUSTOM)


def contrib_nodes(model: Any) -> list[Any]:
    """Return the nodes, those in functions included, of neither ONNX's nor Qualcomm's domains nor a local function."""
    local = {(function.domain, function.name) for function in model.functions}
    known = (*STANDARD, *QUALCOMM)
    return [
        node
        for part in (model.graph, *model.functions)
        for node in nodes_of(part)
        if node.domain not in known and (node.domain, node.op_type) not in local
    ]


def contrib_summary(model: Any) -> str | None:
    """Return the number of contrib operators in a ModelProto, and the tools that write them; None if there are none."""
    counts = Counter((node.domain, node.op_type) for node in contrib_nodes(model))
    if not counts:
        return None
    summary = ", ".join(f"{count} {domain}::{operator}" for (domain, operator), count in counts.most_common(4))
    more = f" and {len(counts) - 4} more kinds" if len(counts) > 4 else ""
    makers = dict.fromkeys(maker(*operator) for operator, _ in counts.most_common())
    return f"{summary}{more}, {'; '.join(makers)}"
