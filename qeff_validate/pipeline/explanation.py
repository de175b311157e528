# SPDX-License-Identifier: Apache-2.0
"""Adds an explanation to a failing result; whatever happens meanwhile, the verdict stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qeff_validate.errors import ValidateError
from qeff_validate.memory import release_memory, without_collection
from qeff_validate.protocols import Runtime, Settings
from qeff_validate.report.result import Result

if TYPE_CHECKING:
    from qeff_validate.pipeline.case_pipeline import Pipeline

ExplainMode = Literal["off", "auto", "full"]

LIMITS_S = {"auto": 60.0, "full": 3600.0}
"""Time limit of one explanation by mode."""


def with_explanation(pipeline: Pipeline, runtime: Runtime, result: Result, settings: Settings, mode: str) -> Result:
    """Return a result with an explanation if it failed and was not expected to.

    Args:
        pipeline: just after it made the result.
        runtime: of the result.
        result: without an explanation.
        settings: of the runtimes that are opened beside it.
        mode: ``off``, ``auto`` (within a minute) or ``full`` (within an hour).
    """
    if mode == "off" or result.status != "fail" or result.expected is not None or not result.metrics:
        return result
    return explained(pipeline, runtime, result, settings, LIMITS_S[mode])


def explained(
    pipeline: Pipeline,
    runtime: Runtime,
    result: Result,
    settings: Settings,
    limit_s: float,
    repro: Path | None = None,
) -> Result:
    """Return a result, whatever its status, with an explanation, or with a finding that says why there is none.

    Args:
        pipeline: just after it made the result.
        runtime: of the result.
        result: without an explanation.
        settings: of the runtimes that are opened beside it.
        limit_s: time limit in seconds.
        repro: folder for a bundle that shows the error by itself.
    """
    with without_collection():
        from qeff_validate.explain.explain import explain

    try:
        with pipeline.stages.step("explain", runtime.name):
            explanation = explain(pipeline, runtime, result, settings, limit_s=limit_s, repro=repro)
    except Exception as exc:  # no explanation is worth a verdict
        kind = "" if isinstance(exc, ValidateError) else f"unexpected {type(exc).__name__}: "
        return replace(
            result, findings=(*result.findings, f"not explained: {kind}{str(exc).splitlines()[0] if str(exc) else ''}")
        )
    finally:
        release_memory()
    return replace(result, explanation=explanation)
