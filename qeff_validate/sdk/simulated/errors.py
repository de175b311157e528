# SPDX-License-Identifier: Apache-2.0
"""What the simulated compiler and container raise; the front ends turn it into exit codes and statuses."""

from __future__ import annotations

from typing import Any

from .graph import opset_of


class CompileError(Exception):
    """The compiler refuses: the text goes to stderr and the exit code is 255 (card-contract §6.6)."""


class QpcError(Exception):
    """A QPC can not be read: the text says whether it is missing, real, foreign or damaged."""


def rejected(model: Any, why: str, operator: str = "", node: Any = None) -> CompileError:
    """Returns the importer's error in the form of card-contract §8, and behind it, marked, what a card's omits.

    Args:
        model: ModelProto.
        why: The reason.
        operator: The operator that is at fault, if it is one.
        node: The node that is at fault, if it is known; its operator need not be given.
    """
    operator = operator or (node.op_type if node is not None else "")
    where = f"Operator-'{operator}'" if operator else "Model"
    place = "" if node is None else f"{named(node)}: "
    return CompileError(
        f"QAIC_ERROR: Error message: [{where}, opset_version-{opset_of(model)}, ir_version-{model.ir_version}]"
        f" : {why}\n"
        "QAICException:Unable to AddNodesToGraphFromModel\n"
        f"simulator: {place}{' '.join(why.split())}"
    )


def named(node: Any) -> str:
    """Returns the name of a NodeProto, or its first output if it has none, with domain and operator."""
    name = f"node '{node.name}'" if node.name else f"the node that computes '{next(iter(node.output), '')}'"
    return f"{name} ({node.domain or 'ai.onnx'}::{node.op_type})"
