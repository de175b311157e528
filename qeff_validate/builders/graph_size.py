# SPDX-License-Identifier: Apache-2.0
"""The size of a user's graph after inlining: every runtime and compiler inlines the functions of a graph first."""

from __future__ import annotations

from pathlib import Path

from qeff_validate.errors import BuildError
from qeff_validate.models.framework_calls import first_line


def check_graph(path: Path) -> None:
    """Refuse a graph whose functions call each other so often that its nodes would exhaust memory.

    Args:
        path: an ONNX file.

    Raises:
        BuildError: the graph has too many nodes, a function calls itself, or the file is no ONNX.
    """
    import onnx

    from qeff_validate.sdk.simulated.compiler.function_inlining import too_large

    try:
        problem = too_large(onnx.load(str(path), load_external_data=False))
    except Exception as exc:  # protobuf's errors depend on its implementation
        raise BuildError(f"cannot read {path} as ONNX: {first_line(exc)}") from exc
    if problem:
        raise BuildError(f"{path} cannot be opened: {problem}")
