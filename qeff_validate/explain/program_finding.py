# SPDX-License-Identifier: Apache-2.0
"""What differs in a block of a compiled program: the rounding that was asked for, or a few columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qeff_validate.explain.block import block_model, sources
from qeff_validate.explain.context import ExplainContext
from qeff_validate.explain.fp16_block import rounded_block, rounds
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.inside_graph import overflow_text
from qeff_validate.explain.linear import FEW_COLUMNS
from qeff_validate.explain.range_audit import FP16_MAX
from qeff_validate.explain.reference_values import MASK
from qeff_validate.tensors import Array, Tensors

ROUNDING = 0.5
"""Part of a module's error from which the rounding that was asked for explains it."""


def rounding_finding(
    context: ExplainContext,
    graph: GraphValues,
    name: str,
    like: Array,
    content: Tensors,
    error: Callable[[Array], float],
) -> tuple[str, float]:
    """Return what fp16 does in the block of a value, and the error that it makes there.

    Args:
        context: of the case.
        graph: the graph.
        name: of the value.
        like: an array of its dtype and shape.
        content: of the graph's inputs, and of the values at which the block begins.
        error: returns the relative L2 error of the value.
    """
    inputs = {other: content[other] for other in sources(graph, name, content)}
    model = block_model(graph, name, inputs, like)
    in_fp16 = rounds(context.pipeline.case, Path(context.pipeline.onnx().path))
    made = error(graph.run_model(rounded_block(model, in_fp16), inputs, [name])[name])
    inner = [value for node in model.graph.node for value in node.output if value and value != name]
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in inner)
    arrays = graph.run_model(model, inputs, [name, *inner]).values()
    sizes = [np.abs(array[np.isfinite(array)]) for array in arrays if array.dtype.kind == "f"]
    most = max((float(size[size < MASK].max(initial=0)) for size in sizes), default=0.0)
    return overflow_text(most) if most > FP16_MAX else "rounding to fp16 makes this error", made


def columns_finding(expected: Any, observed: Any) -> str:
    """Return which columns of a value differ, if a few do and all others are as good as equal; else empty.

    Args:
        expected: ``[tokens, …]``.
        observed: of the same size.

    Examples:
        >>> columns_finding(np.ones((3, 20)), np.ones((3, 20)) + np.eye(1, 20, 4))
        '1 of 20 columns of its output differ, first column 4'
    """
    right, wrong = (np.asarray(values, np.float64).reshape(len(expected), -1) for values in (expected, observed))
    errors = np.linalg.norm(wrong - right, axis=0)
    differing = np.flatnonzero(errors > FEW_COLUMNS * errors.max())
    if not 0 < len(differing) <= FEW_COLUMNS * errors.size:
        return ""
    return f"{len(differing)} of {errors.size} columns of its output differ, first column {differing[0]}"
