# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the simulated compiler and of QPC files; they end as exit codes and statuses."""

from __future__ import annotations

from typing import Any

from .graph import opset_of


class CompileError(Exception):
    """The compilation failed: the text is printed to stderr and the exit code is 255 (card-contract §6.6)."""


class QpcError(Exception):
    """A QPC cannot be read: the text says whether it is missing, a real card's, no QPC, or damaged."""


def rejected(model: Any, why: str, operator: str = "", node: Any = None) -> CompileError:
    """Return the importer's error in the form of card-contract §8, followed by a line ``simulator:`` with more details.

    Args:
        model: ModelProto.
        why: the reason.
        operator: type of the refused operator, if there is one.
        node: the refused NodeProto, if it is known; it also gives the operator.
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
    """Describe a NodeProto by its name, or by its first output if it has none, with domain and operator."""
    name = f"node '{node.name}'" if node.name else f"the node that computes '{next(iter(node.output), '')}'"
    return f"{name} ({node.domain or 'ai.onnx'}::{node.op_type})"
