# SPDX-License-Identifier: Apache-2.0
"""What the steps of one explanation share: the case's pipeline, the runtime, its result, and the time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qeff_validate.artifact import Artifact
from qeff_validate.errors import ValidateError
from qeff_validate.memory import without_collection
from qeff_validate.protocols import Explained, OriginalRun, Runtime, Settings, runtime
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime, SharedChild

NOISE = {"fp32": 5e-6, "fp16": 5e-3}
"""Relative L2 that a stage in float32, and the rounding of a device, make in a healthy run, where none is measured."""


class TimeIsUpError(ValidateError):
    """The time limit of an explanation has passed; what was found until then is kept."""


@dataclass
class Clock:
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


@dataclass(frozen=True, slots=True)
class Subset:
    """A few texts of a case.

    Attributes:
        inputs: of the model kind.
        reference: outputs of the original model.
        rows: their rows in an output of the case, int64.
    """

    inputs: Any
    reference: Any
    rows: Any


@dataclass
class ExplainContext:
    """One explanation.

    Attributes:
        pipeline: of the case (`pipeline.case_pipeline.Pipeline`), just after the result was made.
        on: the runtime of the result.
        result: with metrics.
        settings: of other runtimes that are opened.
        clock: checked between steps.
        shared: opens the ONNX files that are not our own export.
    """

    pipeline: Any
    on: Runtime
    result: Result
    settings: Settings
    clock: Clock
    shared: SharedChild | None = None

    @property
    def model(self) -> Any:
        """The model wrapper."""
        return self.pipeline.model()

    @property
    def unoptimized(self) -> Settings:
        """Settings with which ONNX Runtime changes nothing in a graph, and copies no weights for its few runs."""
        return replace(self.settings, ort_optimization="disabled", packed_weights=False)

    def isolated(self, name: str, settings: Settings | None = None) -> Runtime:
        """Return a runtime whose sessions of what is not our own export are in another process."""
        settings = settings or self.settings
        return IsolatedRuntime(runtime(name, settings), name, settings, self.shared)

    def subset(self, texts: list[int]) -> Subset:
        """Return some texts alone."""
        pipeline = self.pipeline
        return Subset(*self.model.subset(pipeline.inputs(), pipeline.reference(), texts))

    def original_run(self, subset: Subset, sizes: Mapping[str, int], row: int) -> OriginalRun:
        """Return one run of the original model, with its outputs by the names that the graph has for them.

        Args:
            subset: the texts.
            sizes: values of the symbols of the interface that are fixed.
            row: the failing one among the rows of the subset.

        Raises:
            IncomparableError: the texts do not fit into one run of these sizes.
        """
        with without_collection():  # transformers and PEFT are imported, and the model is loaded
            original: OriginalRun = self.model.original_run(subset.inputs, subset.reference, sizes, row)
        names = self.pipeline.case.artifacts.outputs

        def renamed(outputs: Mapping[str, Any]) -> dict[str, Any]:
            return {names.get(name, name): value for name, value in outputs.items()}

        return replace(
            original,
            run=lambda: renamed(original.run()),
            owners=renamed(original.owners),
            candidates=lambda: {text: renamed(outputs) for text, outputs in original.candidates().items()},
        )

    def graph_artifact(self) -> Artifact | None:
        """Return the ONNX file that the runtime's artifact is made from; None if there is none."""
        if self.on.kind == "module" or (self.on.kind == "qpc" and self.pipeline.case.artifacts.qpc is not None):
            return None
        artifact: Artifact = self.pipeline.onnx()
        return artifact

    def labels(self, rows: int) -> list[str]:
        """Return the text of each row of an output."""
        labels, reference = list(self.pipeline.inputs().labels), self.pipeline.reference()
        if len(labels) == rows or not isinstance(self.model, Explained):
            return [labels[row] if row < len(labels) else "" for row in range(rows)]
        return [labels[self.model.text_of_row(self.pipeline.inputs(), reference, row)] for row in range(rows)]
