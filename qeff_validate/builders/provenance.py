# SPDX-License-Identifier: Apache-2.0
"""The provenance of a graph: in the metadata of an ONNX file that we exported, and beside a QPC that we compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.artifact import Kind
from qeff_validate.sdk.simulated.compiler.contrib_operators import contrib_summary

METADATA_KEY = "qeff_validate"
"""Key in an ONNX file's metadata whose value is the fingerprint of the model wrapper, as JSON."""

QPC_PROVENANCE = "about.json"
"""File beside a QPC's directory: the fingerprint from its ONNX file, and the buckets that it was compiled for."""


@dataclass(frozen=True, slots=True)
class GraphProvenance:
    """What is known of a graph without running it.

    Attributes:
        model: fingerprint of the model wrapper that the graph was exported from; None if unknown.
        max_tokens: sequence length of ``input_ids``, where that is fixed; None otherwise.
        max_positions: greatest context length of the KV cache, where that is fixed; None otherwise.
        contrib: summary of the operators outside the ONNX standard, and of the tools that write them; None if there
            are none, or if they are unknown.
    """

    model: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    max_positions: int | None = None
    contrib: str | None = None


def read_provenance(kind: Kind, path: Path, ids: str = "input_ids") -> GraphProvenance:
    """Read the provenance of an ONNX file or a QPC; empty if it cannot be read.

    Args:
        kind: ``onnx`` or ``qpc``.
        path: the ONNX file, or the QPC's directory.
        ids: the graph's name for ``input_ids``.
    """
    try:
        return _of_onnx(path, ids) if kind == "onnx" else _of_qpc(path)
    except Exception:  # protobuf's errors depend on its implementation; the runtime will report what is wrong
        return GraphProvenance()


def graph_fingerprint(model: Any) -> Any:
    """Return the fingerprint in the metadata of a loaded ONNX model; None if it has none."""
    values = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    return json.loads(values[0]) if values else None


def _of_onnx(path: Path, ids: str) -> GraphProvenance:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    lengths = [value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.input if value.name == ids]
    max_tokens = lengths[0] or None if lengths else None
    return GraphProvenance(graph_fingerprint(model), max_tokens, contrib=contrib_summary(model))


def _of_qpc(path: Path) -> GraphProvenance:
    stored = json.loads((path.parent / QPC_PROVENANCE).read_text(encoding="utf-8"))

    def largest(symbol: str) -> int | None:
        return max((bucket[symbol] for bucket in stored["buckets"] if symbol in bucket), default=None)

    context = largest("ctx_len")
    return GraphProvenance(stored["model"], largest("seq_len") if context is None else None, context)
