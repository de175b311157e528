# SPDX-License-Identifier: Apache-2.0
"""What a graph says that it was made from: in the metadata of an ONNX file of ours, and beside a QPC compiled by us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.artifact import Kind
from qeff_validate.sdk.simulated.compiler.contrib_operators import contrib_summary

KEY = "qeff_validate"
"""Of an entry in an ONNX file's metadata: the fingerprint of the model wrapper, as JSON."""

BESIDE = "about.json"
"""The file beside a QPC's directory: the same of its ONNX file, and the sizes that it was compiled for."""


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a graph without running it.

    Attributes:
        model: fingerprint of the wrapper that it was exported from; None if nothing says so.
        most: tokens of its longest row, where that is fixed.
        slots: greatest number of positions that it keeps keys and values of, where that is fixed.
        contrib: operators that are not ONNX's own, and what made them; None if there are none, or it is not known.
    """

    model: Mapping[str, Any] | None = None
    most: int | None = None
    slots: int | None = None
    contrib: str | None = None


def about(kind: Kind, path: Path, ids: str = "input_ids") -> About:
    """Read it of an ONNX file or a QPC's directory; nothing is known of what cannot be read.

    Args:
        kind: ``onnx`` or ``qpc``.
        path: the file, or the directory.
        ids: what the graph calls ``input_ids``.
    """
    try:
        return _of_onnx(path, ids) if kind == "onnx" else _of_qpc(path)
    except Exception:  # protobuf's errors depend on its implementation; the runtime will say what is wrong
        return About()


def _of_onnx(path: Path, ids: str) -> About:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    widths = [value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.input if value.name == ids]
    return About(recorded_in(model), widths[0] or None if widths else None, contrib=contrib_summary(model))


def recorded_in(model: Any) -> Any:
    """Return what a loaded ONNX model says that it was exported from; None if it does not."""
    found = [entry.value for entry in model.metadata_props if entry.key == KEY]
    return json.loads(found[0]) if found else None


def _of_qpc(path: Path) -> About:
    said = json.loads((path.parent / BESIDE).read_text(encoding="utf-8"))

    def most(name: str) -> int | None:
        return max((bucket[name] for bucket in said["buckets"] if name in bucket), default=None)

    slots = most("ctx_len")
    return About(said["model"], most("seq_len") if slots is None else None, slots)
