# SPDX-License-Identifier: Apache-2.0
"""What the simulated compiler and container raise; the front ends turn it into exit codes and statuses."""

from __future__ import annotations

from typing import Any

STANDARD = ("", "ai.onnx")


class CompileError(Exception):
    """The compiler refuses: the text goes to stderr and the exit code is 255 (qaic-contract §6.6)."""


class QpcError(Exception):
    """A QPC can not be read: the text says whether it is missing, real, foreign or damaged."""


def opset_of(model: Any) -> int:
    """Returns the opset of the standard operators that a ModelProto asks for."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD), default=1)


def rejected(model: Any, why: str, operator: str = "") -> CompileError:
    """Returns the importer's error about a model, or one of its operators, in the form of qaic-contract §8."""
    where = f"Operator-'{operator}'" if operator else "Model"
    return CompileError(
        f"QAIC_ERROR: Error message: [{where}, opset_version-{opset_of(model)}, ir_version-{model.ir_version}]"
        f" : {why}\n"
        "QAICException:Unable to AddNodesToGraphFromModel"
    )
