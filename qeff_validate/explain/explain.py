# SPDX-License-Identifier: Apache-2.0
"""Explains one failing result: runs what stands between reference and runtime, and looks into the graph.

Only a few rows are run again. Nothing here judges: the verdict is what it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact
from qeff_validate.errors import ValidateError
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.layers import Layers, find_layers
from qeff_validate.explain.locate import Location, locate
from qeff_validate.explain.matching import of_tokens, relative_error
from qeff_validate.explain.outside import BESIDE, ReadingSession, outside_finding
from qeff_validate.explain.range_audit import FP16_MAX
from qeff_validate.explain.reference_values import ReferenceValues, record
from qeff_validate.explain.stages import FLOAT32, guilty_stage, stage_shares
from qeff_validate.explain.weights import compare_weights, repairs
from qeff_validate.files import temporary_folder
from qeff_validate.protocols import Explained, Measured, OriginalRun, Runtime, Settings, capabilities, runtime
from qeff_validate.report.explanation import Explanation, StageShare
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime
from qeff_validate.sdk.locate import simulated
from qeff_validate.tensors import Array, Tensors

HEALTHY_ROWS = 2
"""Rows without an error that are looked at beside the failing one; they let other poolings be told apart."""

OUTSIDE = ("runtime", "compiler and runtime")
"""Stages in which no graph is to blame."""

NOISE = {"fp32": 5e-6, "fp16": 5e-3}
"""Relative L2 that a stage in float32, and the rounding of a device, make in a healthy run, where none is measured."""

MOST_LAYERS = 40
"""Layers that a report holds: those with the greatest local error over floor."""


class TimeIsUpError(ValidateError):
    """The time limit of an explanation has passed; what was found until then is kept."""


@dataclass
class _Clock:
    """Seconds of an explanation."""

    limit: float
    start: float

    def check(self) -> None:
        """Raise `TimeIsUpError` if the limit has passed."""
        if time.monotonic() - self.start > self.limit:
            raise TimeIsUpError(f"the time limit of {self.limit:g} s has passed")

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return time.monotonic() - self.start


def explain(pipeline: Any, on: Runtime, result: Result, settings: Settings, *, limit_s: float = 60.0) -> Explanation:
    """Return where the error of a result comes from.

    Args:
        pipeline: of the case (`pipeline.case_pipeline.Pipeline`), just after `result` was made.
        on: the runtime of the result.
        result: of the case on the runtime, with metrics.
        settings: of other runtimes that are opened.
        limit_s: time limit; what is known when it has passed is returned.

    Raises:
        ValidateError: something could not be built, loaded or run.
    """
    clock = _Clock(limit_s, time.monotonic())
    work = _Explainer(pipeline, on, result, settings, clock)
    try:
        work.run()
    except ValidateError as exc:  # such as a time limit, or no original model here
        if not work.known:
            raise
        work.unfinished = str(exc).splitlines()[0]
    return work.explanation()


class _Explainer:
    """The steps of one explanation, and what is known after each."""

    def __init__(self, pipeline: Any, on: Runtime, result: Result, settings: Settings, clock: _Clock) -> None:
        self._pipeline, self._on, self._result, self._settings, self._clock = pipeline, on, result, settings, clock
        self.unfinished = ""
        self._shares: tuple[StageShare, ...] = ()
        self._stage: str | None = None
        self._layers: Layers | None = None
        self._location = Location(None, "")
        self._rows: list[int] = []

    @property
    def known(self) -> bool:
        """Whether the shares of the stages are known."""
        return bool(self._shares)

    def run(self) -> None:
        """Attribute the error to a stage, and look for the layer if it is made in the graph."""
        pipeline, model = self._pipeline, self._pipeline.model()
        actual, reference = pipeline.actual, pipeline.reference()
        name = pipeline.graph().outputs[0].name
        if (
            not isinstance(model, Measured)
            or name not in actual
            or name not in reference
            or actual[name].shape != reference[name].shape
        ):
            return
        row, texts = self._choose(reference[name], actual[name])
        revisits = revisits_finding(reference, actual, name)
        if revisits:
            self._stage, self._location = OUTSIDE[self._on.kind == "qpc"], Location(None, revisits)
            return
        subset = self._attributed(name, texts)
        if self._stage in OUTSIDE:
            self._location = self._adapters_held() or Location(None, self._outside(name))
            if self._location.finding != BESIDE:
                return
            # the graph is wrong, but with these rows alone it is right: look at the row in its own batch
            subset = self._attributed(name, self._batch(texts[-1]))
            if self._stage in OUTSIDE:
                return
        if isinstance(model, Explained) and self._on.kind != "module" and self._graph_artifact() is not None:
            self._look_inside(subset, int(np.flatnonzero(subset[2] == row)[0]))

    def _attributed(self, name: str, texts: list[int]) -> tuple[Any, Tensors, Any]:
        """Attribute the error of some texts to a stage, and return them with their reference and rows."""
        pipeline = self._pipeline
        subset: tuple[Any, Tensors, Any] = pipeline.model().subset(pipeline.inputs(), pipeline.reference(), texts)
        self._rows = [int(place) for place in subset[2]]
        self._attribute(name, subset, pipeline.actual[name][subset[2]])
        self._clock.check()
        return subset

    def _batch(self, text: int) -> list[int]:
        """Return the texts that are run together with one."""
        size = int(getattr(self._pipeline.options, "batch_size", 1))
        ids = self._pipeline.inputs().ids
        start = text // size * size
        return [place for place in range(start, min(start + size, len(ids))) if ids[place].size]

    # --- rows ------------------------------------------------------------------------------

    def _choose(self, reference: Array, actual: Array) -> tuple[int, list[int]]:
        """Return the row with the greatest error, and its text with a few others."""
        pipeline, model = self._pipeline, self._pipeline.model()
        with np.errstate(all="ignore"):
            flat = [array.reshape(len(array), -1).astype(np.float64) for array in (reference, actual)]
            errors = np.linalg.norm(flat[1] - flat[0], axis=1) / np.linalg.norm(flat[0], axis=1)
        errors[np.linalg.norm(flat[0], axis=1) == 0] = 0
        order = np.argsort(np.where(np.isnan(errors), np.inf, errors), kind="stable")
        row = int(order[-1])
        if not isinstance(model, Explained):
            return row, list(range(len(pipeline.inputs().ids)))
        text = model.text_of_row(pipeline.inputs(), pipeline.reference(), row)
        texts = [text]
        ids = pipeline.inputs().ids
        for other in map(int, order):
            candidate = model.text_of_row(pipeline.inputs(), pipeline.reference(), other)
            sizes = {ids[known].size for known in texts}
            if (
                len(texts) <= HEALTHY_ROWS
                and candidate not in texts
                and ids[candidate].size
                and ids[candidate].size not in sizes
            ):
                texts.append(candidate)
        return row, texts[::-1]  # not the first of its batch, whose place is special in some faults

    # --- stages ----------------------------------------------------------------------------

    def _attribute(self, name: str, subset: tuple[Any, Tensors, Any], actual: Array) -> None:
        inputs, reference, rows = subset
        pipeline, model = self._pipeline, self._pipeline.model()
        outputs: list[tuple[str, Array]] = []
        exact = self._exact(name, rows)
        if exact is not None:
            outputs.append(("reference", exact))
        outputs.append((FLOAT32, reference[name]))

        def run(label: str, opened: Any) -> None:
            self._clock.check()
            with opened as session:
                outputs.append((label, np.asarray(model.infer(session, inputs, reference)[name])))

        kind, foreign = self._on.kind, pipeline.is_foreign(self._on.kind)
        if not foreign and pipeline.case.artifacts.reference is None:
            run("wrapper", pipeline.opened(runtime("torch"), pipeline.module()))
        if kind != "module" and (graph := self._graph_artifact()) is not None:
            plain = replace(self._settings, ort_optimization="disabled")
            run("export", pipeline.opened(self._isolated("ort", plain), graph))
            if kind == "onnx" and relative_error(outputs[-1][1], actual) <= NOISE["fp32"]:
                outputs.append(("optimizer", actual))  # the file gives the same without it: it need not be run
            elif kind == "onnx":
                run("optimizer", pipeline.opened(self._isolated("ort", self._settings), graph))
            elif pipeline.case.artifacts.qpc is None:
                sdk = simulated()
                run("precision", pipeline.opened(self._isolated("sim", self._settings), pipeline.qpc(sdk)))
        outputs.append((OUTSIDE[kind == "qpc"], actual))
        self._shares = stage_shares(outputs)
        self._stage = guilty_stage(self._shares, self._expected()) if self._result.status == "fail" else None

    def _expected(self) -> dict[str, float]:
        """Return what each stage makes in a healthy run (relative L2): the measured floor of its precision."""
        expected = dict.fromkeys(("wrapper", "export", "optimizer", "runtime"), NOISE["fp32"])
        expected["precision"] = NOISE["fp16"]
        pipeline = self._pipeline
        if self._on.kind == "qpc" and pipeline.case.tolerance != "table":
            floor = pipeline.floor(pipeline.case.precision)
            if floor is not None and "rel_l2" in floor.errors:
                expected["precision"] = 2 * floor.level("rel_l2")
        return expected

    def _exact(self, name: str, rows: Any) -> Array | None:
        """Return the stored float64 reference of rows; None if it is not there for all of them."""
        sample = self._pipeline.sample()
        if self._pipeline.case.artifacts.reference is not None or self._pipeline.case.tolerance == "table":
            return None
        known = np.arange(len(self._pipeline.reference()[name])) if sample.rows is None else sample.rows
        if not set(rows) <= set(known.tolist()):
            return None
        exact: Array = self._pipeline.exact()[name][np.searchsorted(known, rows)]
        return exact

    def _isolated(self, name: str, settings: Settings) -> Runtime:
        return IsolatedRuntime(runtime(name, settings), name, settings)

    def _graph_artifact(self) -> Artifact | None:
        """Return the ONNX file that the runtime's artifact is made from; None if there is none."""
        if self._on.kind == "qpc" and self._pipeline.case.artifacts.qpc is not None:
            return None
        artifact: Artifact = self._pipeline.onnx()
        return artifact

    # --- outside of the graph --------------------------------------------------------------

    def _outside(self, name: str) -> str:
        """Return what differs between the runtime's outputs and those that its file gives when it is run again."""
        pipeline, model = self._pipeline, self._pipeline.model()
        clean = self._isolated(self._on.name, self._settings)
        artifact = pipeline.artifact(self._on.kind, capabilities(self._on).sdk)
        with pipeline.opened(clean, artifact) as session:
            expected = np.asarray(model.infer(session, pipeline.inputs(), pipeline.reference())[name])
        return outside_finding(expected, pipeline.actual[name], self._labels(len(expected)))

    def _labels(self, rows: int) -> list[str]:
        """Return the text of each row of an output."""
        pipeline, model = self._pipeline, self._pipeline.model()
        labels, reference = list(pipeline.inputs().labels), pipeline.reference()
        if len(labels) == rows or not isinstance(model, Explained):
            return [labels[row] if row < len(labels) else "" for row in range(rows)]
        return [labels[model.text_of_row(pipeline.inputs(), reference, row)] for row in range(rows)]

    def _adapters_held(self) -> Location | None:
        """Return where the runtime holds other adapter tensors than it was fed; None if it holds them all."""
        pipeline, model, inputs = self._pipeline, self._pipeline.model(), self._pipeline.inputs()
        adapters = getattr(inputs, "adapters", {})
        if not any(adapters.values()):
            return None
        artifact = pipeline.artifact(self._on.kind, capabilities(self._on).sdk)
        with pipeline.opened(self._on, artifact) as opened:
            session = ReadingSession(opened, adapters, half=str(self._result.precision).startswith("fp16"))
            model.infer(session, inputs, pipeline.reference())
        return session.location()

    # --- inside the graph ------------------------------------------------------------------

    def _look_inside(self, subset: tuple[Any, Tensors, Any], row: int) -> None:
        inputs, reference, _ = subset
        pipeline, model = self._pipeline, self._pipeline.model()
        artifact = self._graph_artifact()
        assert artifact is not None
        assert artifact.path is not None
        level = self._settings if self._stage == "optimizer" else replace(self._settings, ort_optimization="disabled")
        with temporary_folder() as folder:
            graph = GraphValues(
                Path(artifact.path), folder, self._isolated("ort", level).open, untrusted=artifact.untrusted
            )
            self._clock.check()
            original: OriginalRun = model.original_run(inputs, reference, graph.sizes(), row)
            self._clock.check()
            names = pipeline.case.artifacts
            feeds = {names.inputs.get(name, name): array for name, array in original.feeds.items()}
            fed = {name: array for name, array in feeds.items() if array.dtype.kind == "f"}
            weights = compare_weights(original.module, {**graph.weights, **fed}, self._clock.check)
            graph.repairs = repairs(original.module, graph.weights, weights)
            recorded = _with_names(record(original), names.outputs)
            self._clock.check()
            layers = find_layers(original, recorded, graph, feeds, "fp32", self._clock.check)
            self._layers = layers
            self._location = locate(original, recorded, graph, layers, weights)
            if self._stage == "precision" and self._location.module is None:
                self._location = overflow(recorded, original.tokens)

    # --- the result ------------------------------------------------------------------------

    def explanation(self) -> Explanation:
        """Return what is known."""
        errors = list(self._layers.errors) if self._layers is not None else []
        if len(errors) > MOST_LAYERS:
            ratios = sorted((error.local / error.floor for error in errors), reverse=True)
            errors = [error for error in errors if error.local / error.floor >= ratios[MOST_LAYERS - 1]][:MOST_LAYERS]
        module = self._location.module
        return Explanation(
            summary=self._summary(),
            stages=self._shares,
            stage=self._stage,
            layers=tuple(replace(error, module=short(error.module)) for error in errors),
            module=None if module is None else short(module),
            finding=short_text(self._location.finding),
            rows=tuple(self._rows),
            seconds=round(self._clock.seconds, 2),
        )

    def _summary(self) -> str:
        module, finding = self._location.module, short_text(self._location.finding)
        stage = f" ({self._stage})" if self._stage else ""
        if module is not None and self._layers is None:
            text = f"adapter of {short(module)}, {finding}"
        elif module is not None:
            where = module if module == "pooling" else f"layer {short(module)}"
            text = f"{where}, {finding}" if finding else f"{where} differs from the original model"
        elif finding:
            text = f"outside of the graph: {finding}"
        elif self._stage in OUTSIDE:
            text = "outside of the graph: its file gives the right values when it is run again"
        elif self._stage is not None:
            text = f"made at the stage {self._stage}; no layer stands out"
        else:
            text = "no stage and no layer stands out"
        return f"{text}{stage}{f'; {self.unfinished}' if self.unfinished else ''}"


def revisits_finding(reference: Tensors, actual: Tensors, name: str) -> str:
    """Return what is wrong if an output is right and only a repetition of its first rows is not; else empty."""
    if relative_error(reference[name], actual[name]) > NOISE["fp16"]:
        return ""
    for other in actual.keys() - reference.keys():
        first = actual[name][: len(actual[other])]
        if first.shape == actual[other].shape and not np.array_equal(first, actual[other]):
            return "a second visit gives other values than the first: state is left over from what ran between"
    return ""


def overflow(recorded: ReferenceValues, tokens: Array) -> Location:
    """Return the first module whose values are beyond the range of fp16, with the greatest; none if all fit."""
    for value in recorded.values:
        most = float(np.abs(of_tokens(value.array, tokens)).max())
        if most > FP16_MAX:
            return Location(value.module, f"values up to {most:.4g} overflow fp16 (65504)")
    return Location(None, "")


PEFT_PREFIX = "base_model.model."


def short(path: str) -> str:
    """Return a path without the two levels that PEFT puts around a model."""
    return path.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


def short_text(text: str) -> str:
    """Return a finding whose paths are without PEFT's levels."""
    return text.replace(PEFT_PREFIX, "").replace(".base_layer", "")


def _with_names(recorded: ReferenceValues, names: dict[str, str]) -> ReferenceValues:
    """Return the values with the names that a user's graph gives its outputs."""
    values = tuple(
        replace(value, output=names.get(value.output, value.output)) if value.output else value
        for value in recorded.values
    )
    return replace(recorded, values=values)
