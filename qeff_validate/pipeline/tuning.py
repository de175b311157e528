# SPDX-License-Identifier: Apache-2.0
"""Looks for the nodes that must stay in float32 for a case to pass on a runtime that opens QPCs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qeff_validate.builders.compiler_inputs import NODE_PRECISION, flag_name, node_precision_text, read_graph
from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.files import temporary_folder
from qeff_validate.memory import release_memory
from qeff_validate.protocols import Runtime, Settings, runtime
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime

if TYPE_CHECKING:
    from qeff_validate.explain.float32_nodes import Search
    from qeff_validate.explain.range_audit import RangeAudit
    from qeff_validate.pipeline.case_pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a search for nodes in float32 came to.

    Attributes:
        before: the result of the case as it is.
        after: the result with the nodes; None if the case passes as it is, or no list was found.
        search: the search; None if the case passes as it is.
        names: first outputs of all nodes of the file: those found, and those that the compiler gets without a case's
            own list, which a list replaces.
        beyond_range: the noise behind the bounds is measured with the values that fp16 cannot hold in float32
            (``precision: {beyond_range: float32}``), because the original model itself overflows.
        by_table: the results with lists are judged by the fixed bounds (``tolerance: table``), because that noise is no
            number either.
    """

    before: Result
    after: Result | None = None
    search: Search | None = None
    names: tuple[str, ...] = ()
    beyond_range: bool = False
    by_table: bool = False

    @property
    def text(self) -> str:
        """Content of the node precision file."""
        return node_precision_text(self.names)


def audit(pipeline: Pipeline, settings: Settings) -> RangeAudit:
    """Return what fp16 does to the values of each node of a case's ONNX graph, over all of its inputs.

    Raises:
        ConfigError: the case brings a QPC, in which no node can be seen.
        ValidateError: the graph could not be built or run.
    """
    from qeff_validate.explain.range_audit import audit_ranges

    check_tunable(pipeline.case)
    plain = replace(settings, ort_optimization="disabled")
    with pipeline.stages.step("range audit"):
        audited = audit_ranges(pipeline, IsolatedRuntime(runtime("ort", plain), "ort", plain))
    release_memory()
    return audited


def check_tunable(case: Case, on: Runtime | None = None) -> None:
    """Check that nodes of a case can be named.

    Raises:
        ConfigError: the case brings a QPC or computes in float32, or the runtime opens no QPC.
    """
    if case.artifacts.qpc is not None:
        raise ConfigError(f"case {case.name!r}: tune compiles the ONNX graph: leave artifacts.qpc out")
    if on is None:
        return
    if on.kind != "qpc":
        raise ConfigError(f"--runtime {on.name}: it opens {on.kind}, and node precision is compiled: name sim or ai100")
    if case.precision.compute != "fp16":
        raise ConfigError(f"case {case.name!r}: precision.compute: {case.precision.compute}: all nodes are in float32")


def _check_no_list(case: Case) -> None:
    if NODE_PRECISION in map(flag_name, case.compile.flags):
        raise ConfigError(f"case {case.name!r}: it has a list already: leave compile.flags.{NODE_PRECISION} out")


def tune(case: Case, on: Runtime, settings: Settings, pipeline_of: Callable[[Case], Pipeline]) -> Tuning:
    """Look for the smallest list of nodes in float32 with which a case passes.

    Args:
        case: without a list of its own, unless it passes.
        on: a runtime that opens QPCs.
        settings: of the runtimes.
        pipeline_of: returns the pipeline of a case.

    Raises:
        ConfigError: see `check_tunable`; or the case does not pass with a list of its own.
        ValidateError: the case ends in an error or does not run, or a compilation with a list does.
    """
    from qeff_validate.explain.float32_nodes import MOST_TRIALS, search, starting_lists

    check_tunable(case, on)
    before = _result(case, on, pipeline_of)
    if before.status == "pass":
        return Tuning(before)
    _check_no_list(case)
    pipeline = pipeline_of(case)
    starts = starting_lists(audit(pipeline, settings))
    path = pipeline.onnx().path
    assert path is not None
    given = list(read_graph(path).float32_nodes)
    beyond_range = by_table = False
    if case.tolerance == "auto" and _overflows(pipeline):
        precision = case.precision.model_copy(update={"beyond_range": "float32"})
        wide = case.model_copy(update={"precision": precision})
        by_table = _overflows(pipeline_of(wide))
        beyond_range = not by_table
        case = case.model_copy(update={"tolerance": "table"}) if by_table else wide
    results: dict[tuple[str, ...], Result] = {}
    with temporary_folder() as folder:

        def passes(names: Sequence[str]) -> bool:
            file = folder / f"{len(results)}.yaml"
            listed = _with_file(case, file, [*given, *(name for name in names if name not in given)])
            trial = pipeline_of(listed)
            with trial.stages.step(f"trial {len(results) + 2} of at most {MOST_TRIALS}, float32 nodes: {len(names)}"):
                results[tuple(names)] = result = _result(listed, on, pipeline_of)
            return result.status == "pass"

        found = search(starts, passes, MOST_TRIALS - 1)
    if found.names is None:
        return Tuning(before, search=found, beyond_range=beyond_range, by_table=by_table)
    names = (*given, *(name for name in found.names if name not in given))
    return Tuning(before, results[found.names], found, names, beyond_range, by_table)


def _overflows(pipeline: Pipeline) -> bool:
    """Return whether the noise of the original model in the case's precision is not finite."""
    floor = pipeline.floor(pipeline.case.precision)
    return floor is not None and not all(np.isfinite(errors).all() for errors in floor.errors.values())


def _with_file(case: Case, file: Path, names: Sequence[str]) -> Case:
    """Write a node precision file, and return the case with it."""
    file.write_text(node_precision_text(names), encoding="utf-8")
    flags = {**case.compile.flags, NODE_PRECISION: str(file)}
    return case.model_copy(update={"compile": case.compile.model_copy(update={"flags": flags})})


def _result(case: Case, on: Runtime, pipeline_of: Callable[[Case], Pipeline]) -> Result:
    pipeline = pipeline_of(case)
    result = pipeline.result(on)
    if result.status in ("error", "not_run"):
        error = ConfigError if result.stage == "config" else ValidateError
        raise error(f"{case.name}-{on.name}: {result.status}: {result.reason}")
    return result
