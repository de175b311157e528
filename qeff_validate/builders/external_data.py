# SPDX-License-Identifier: Apache-2.0
"""The files that hold an ONNX model's tensors outside of the model file, as its own entries name them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qeff_validate.errors import BuildError
from qeff_validate.models.framework_calls import first_line
from qeff_validate.models.sources.checkpoint import checked, inside

HOLDERS = frozenset({
    "AttributeProto", "FunctionProto", "GraphProto", "ModelProto", "NodeProto", "SparseTensorProto", "TensorProto",
    "TrainingInfoProto",
})  # fmt: skip
"""Messages of ONNX that may hold a tensor."""


def external_files(path: Path) -> list[Path]:
    """Return the files of external data of an ONNX file: of initializers, constants, functions, and subgraphs.

    Raises:
        ConfigError: one is missing, no regular file, or outside of the directory of the ONNX file.
        BuildError: the file is no ONNX.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as exc:  # protobuf's errors depend on its implementation
        raise BuildError(f"cannot read {path} as ONNX: {first_line(exc)}") from exc
    return checked(inside(path.parent, location, path) for location in dict.fromkeys(_locations(model)))


def _locations(message: Any) -> Iterator[str | None]:
    """Yield where each external tensor below a protobuf message lies."""
    if message.DESCRIPTOR.name == "TensorProto":
        if message.data_location == message.EXTERNAL:
            yield {entry.key: entry.value for entry in message.external_data}.get("location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.name in HOLDERS:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _locations(part)
