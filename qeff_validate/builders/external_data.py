# SPDX-License-Identifier: Apache-2.0
"""The external data files of an ONNX model: tensors that are stored outside of the model file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qeff_validate.errors import BuildError
from qeff_validate.models.framework_calls import first_line
from qeff_validate.models.sources.checkpoint import checked, inside

TENSOR_MESSAGES = frozenset({
    "AttributeProto", "FunctionProto", "GraphProto", "ModelProto", "NodeProto", "SparseTensorProto", "TensorProto",
    "TrainingInfoProto",
})  # fmt: skip
"""Protobuf messages of ONNX that contain tensors, directly or in a field."""


def external_files(path: Path) -> list[Path]:
    """Return the external data files of an ONNX file: of initializers, constants, functions and subgraphs.

    Raises:
        ConfigError: a file is missing, not a regular file, or outside of the directory of the ONNX file.
        BuildError: the file is no ONNX.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as exc:  # protobuf's errors depend on its implementation
        raise BuildError(f"cannot read {path} as ONNX: {first_line(exc)}") from exc
    return files_of(model, path)


def files_of(model: Any, path: Path) -> list[Path]:
    """Return the external data files of a ModelProto that was read from a path; see `external_files`."""
    return checked(inside(path.parent, location, path) for location in dict.fromkeys(_locations(model)))


def _locations(message: Any) -> Iterator[str | None]:
    """Yield the location of each external tensor in a protobuf message and its fields."""
    if message.DESCRIPTOR.name == "TensorProto":
        if message.data_location == message.EXTERNAL:
            yield {entry.key: entry.value for entry in message.external_data}.get("location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.name in TENSOR_MESSAGES:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _locations(part)
