# SPDX-License-Identifier: Apache-2.0
"""Runs a few texts at each stage between the reference and a runtime, and attributes the error to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.context import NOISE, ExplainContext, Subset
from qeff_validate.explain.stages import FLOAT32, guilty_stage, stage_shares
from qeff_validate.protocols import runtime
from qeff_validate.report.explanation import StageShare
from qeff_validate.sdk.locate import simulated
from qeff_validate.tensors import Array

OUTSIDE = ("runtime", "compiler and runtime")
"""Stages in which no graph is to blame."""

REST = 0.1
"""Part of an error that may be left for later stages that are not run: the share of an earlier one is clear then."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """What each stage adds to the error of a few texts.

    Attributes:
        shares: from the reference to the runtime.
        stage: the guilty one; None if none stands out, or the result does not fail.
    """

    shares: tuple[StageShare, ...] = ()
    stage: str | None = None


def attribute(context: ExplainContext, name: str, subset: Subset) -> Attribution:
    """Attribute the error of an output.

    Args:
        context: the explanation.
        name: of the output.
        subset: the texts.
    """
    pipeline, model = context.pipeline, context.model
    actual = pipeline.actual[name][subset.rows]
    outputs: list[tuple[str, Array]] = []
    exact = _exact(pipeline, name, subset.rows)
    if exact is not None:
        outputs.append(("reference", exact))
    outputs.append((FLOAT32, subset.reference[name]))

    def run(label: str, opened: Any) -> None:
        context.clock.check()
        with opened as session:
            outputs.append((label, np.asarray(model.infer(session, subset.inputs, subset.reference)[name])))

    kind, foreign = context.on.kind, pipeline.is_foreign(context.on.kind)
    if not foreign and pipeline.case.artifacts.reference is None:
        run("wrapper", pipeline.opened(runtime("torch"), pipeline.module()))
    if (graph := context.graph_artifact()) is not None:
        run("export", pipeline.opened(context.isolated("ort", context.unoptimized), graph))
        if kind == "onnx" and relative_error(outputs[-1][1], actual) <= NOISE["fp32"]:
            outputs.append(("optimizer", actual))  # the file gives the same without it: it need not be run
        elif kind == "onnx":
            run("optimizer", pipeline.opened(context.isolated("ort"), graph))
        elif _has_the_error(outputs[-2][1], outputs[-1][1], actual):
            outputs.append(("precision", actual))  # rounding makes what little is left
        elif pipeline.case.artifacts.qpc is None:
            run("precision", pipeline.opened(context.isolated("sim"), pipeline.qpc(simulated())))
    outputs.append((OUTSIDE[kind == "qpc"], actual))
    shares = stage_shares(outputs)
    failed = context.result.status == "fail"
    return Attribution(shares, guilty_stage(shares, _expected(context)) if failed else None)


def _has_the_error(before: Array, after: Array, actual: Array) -> bool:
    """Return whether a stage makes nearly all of an error: what the stages behind it add is a small part, and noise."""
    left = relative_error(after, actual)
    return left <= NOISE["fp16"] and left <= REST * relative_error(before, after)


def _expected(context: ExplainContext) -> dict[str, float]:
    """Return what each stage makes in a healthy run (relative L2): the measured floor of its precision."""
    expected = dict.fromkeys(("wrapper", "export", "optimizer", "runtime"), NOISE["fp32"])
    expected["precision"] = NOISE["fp16"]
    pipeline = context.pipeline
    if context.on.kind == "qpc" and pipeline.case.tolerance != "table":
        floor = pipeline.floor(pipeline.case.precision)
        if floor is not None and "rel_l2" in floor.errors:
            expected["precision"] = 2 * floor.level("rel_l2")
    return expected


def _exact(pipeline: Any, name: str, rows: Any) -> Array | None:
    """Return the stored float64 reference of rows; None if it is not there for all of them."""
    if pipeline.case.artifacts.reference is not None or pipeline.case.tolerance == "table":
        return None
    sample = pipeline.sample()
    known = np.arange(len(pipeline.reference()[name])) if sample.rows is None else sample.rows
    if not set(rows) <= set(known.tolist()):
        return None
    exact: Array = pipeline.exact()[name][np.searchsorted(known, rows)]
    return exact
