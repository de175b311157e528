# SPDX-License-Identifier: Apache-2.0
"""One case's way from inputs to results: inputs → reference → artifact → session → tensors → verdict."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qeff_validate.artifact import Kind
from qeff_validate.comparison.task_metrics import TaskScore
from qeff_validate.config.case import Precision
from qeff_validate.errors import ConfigError, IncomparableError, UnstableReferenceError, ValidateError
from qeff_validate.files import temporary_beside
from qeff_validate.json_tensor import json_tensor
from qeff_validate.memory import trim_memory
from qeff_validate.pipeline.case_artifacts import CaseArtifacts
from qeff_validate.pipeline.expectations import with_expectation
from qeff_validate.pipeline.recorded_file import is_input, parts, sealed
from qeff_validate.pipeline.relation_store import kept_relation
from qeff_validate.pipeline.timing import TimedSession
from qeff_validate.prechecks.checks import ABOUT, collect_evidence, run_prechecks, with_feed_prechecks, with_prechecks
from qeff_validate.prechecks.feed_monitor import FeedMonitor
from qeff_validate.prechecks.graph_precision import GraphPrecision, combined, measurable
from qeff_validate.protocols import (
    ComparisonContext,
    FillerChecked,
    Prechecked,
    Runtime,
    Session,
    Settings,
    TaskScored,
    capabilities,
)
from qeff_validate.report.result import Precheck, Result
from qeff_validate.tensors import Array, Tensors, save_tensors

SATURATION = (
    "on processors without VNNI, ONNX Runtime saturates sums of uint8 times int8: weights in uint8, reduce_range of"
    " quantize_dynamic, or its session option session.x64quantprecision avoid it"
)


class Pipeline(CaseArtifacts):
    """One case's way from inputs to results on any runtime."""

    actual: Tensors = MappingProxyType({})
    """Outputs of the last runtime, for further analysis."""

    def result(self, runtime: Runtime) -> Result:
        """Run and judge the case on one runtime; whatever goes wrong becomes a result."""
        result = self._guarded(runtime, lambda base: self._judged(runtime, base))
        trim_memory()  # only now nothing holds the session
        return with_expectation(self.case, result)

    def _guarded(self, runtime: Runtime, judge: Callable[[dict[str, Any]], Result]) -> Result:
        base: dict[str, Any] = {"case": self.case.name, "runtime": runtime.name}
        try:
            missing = runtime.probe()
            if missing:
                return Result(**base, status="not_run", reason=missing)
            base["simulated"] = capabilities(runtime).simulated
            base["reference"] = "hf" if self.case.artifacts.reference is None else "recorded"
            base["precision"] = self.precision(runtime).profile
            return judge(base)
        except UnstableReferenceError as exc:
            return Result(**base, status="inconclusive", reason=str(exc), stage="reference")
        except ValidateError as exc:
            stage = "config" if isinstance(exc, ConfigError) else exc.stage
            return Result(**base, status="error", reason=str(exc), stage=stage)
        except Exception as exc:  # one runtime's crash must not lose the other results
            notes = ("".join(traceback.format_exception(exc)[-3:]),)
            reason = f"unexpected {type(exc).__name__}: {exc}"
            return Result(**base, status="error", reason=reason, stage=getattr(exc, "stage", None), notes=notes)

    def precision(self, runtime: Runtime) -> Precision:
        """Return what a runtime computes in, by its capabilities; a user's file has a precision of its own."""
        compute = capabilities(runtime).compute
        asked = self.case.precision if compute is None else Precision(compute=compute)
        return combined(asked, self.file_precision(runtime.kind))

    def _file_may_be_the_cause(self, runtime: Runtime) -> bool:
        """Return whether a user's file rounds in ways that no bound allows for."""
        file = self.file_precision(runtime.kind)
        return bool(file.weights) or (bool(file.where) and self.precision(runtime).compute == "fp32")

    def _file_findings(self, runtime: Runtime) -> Iterator[str]:
        """Say in what precision a user's file computes, if it is not float32, and what completes it on the host."""
        if runtime.kind != "module":
            yield from self.adaptations
        file = self.file_precision(runtime.kind)
        if file != GraphPrecision():
            precision = self.precision(runtime)
            said = f"the bounds are those of {precision.profile}" if measurable(precision) else "no noise is measured"
            yield f"the file computes in {file.words} ({file.where}); {said}"
        if runtime.kind == "onnx" and file.integers is not None and file.integers.may_saturate:
            yield SATURATION

    def _judged(self, runtime: Runtime, base: dict[str, Any]) -> Result:
        base["prechecks"] = prechecks = self.prechecks(runtime.kind)
        try:
            result = self._numbers(runtime, base)
        except Exception as exc:  # what is known to be wrong is said first, and is mostly why
            if all(precheck.state != "differs" for precheck in prechecks):
                raise
            result = Result(**base, status="error", reason=f"there are none: {exc}")
        return with_prechecks(result)

    def prechecks(self, kind: Kind) -> tuple[Precheck, ...]:
        """Compare what a runtime opens, and the reference, with what the case asks for; nothing is built or run."""

        def compare() -> tuple[Precheck, ...]:
            user_artifacts = self.case.artifacts
            if kind == "qpc" and user_artifacts.qpc is not None:
                self._adopted("qpc", user_artifacts.qpc)
            elif kind != "module" and user_artifacts.onnx is not None:
                self._adopted("onnx", user_artifacts.onnx)  # a pipe or a device among its files must not be opened
            recorded = None if self.case.artifacts.reference is None else self.recorded()
            in_memory = self._in_memory is not None
            evidence = collect_evidence(self.case, kind, self.model(), recorded, in_memory=in_memory)
            return run_prechecks(self.model(), self.inputs(), evidence, lambda: self.body_key()["body"])

        return self.stages.once(f"prechecks.{kind}", compare, f"prechecks for {kind}")

    def _numbers(self, runtime: Runtime, base: dict[str, Any]) -> Result:
        inputs = self.inputs()
        reference, precision = self.reference(), self.precision(runtime)
        floor = self.floor(precision) if measurable(precision) else None
        artifact = self.artifact(runtime.kind, capabilities(runtime).sdk)
        with ExitStack() as held:
            start = time.perf_counter()
            with self.stages.step("load", runtime.name):
                session = TimedSession(held.enter_context(self.opened(runtime, artifact)))
                monitor = FeedMonitor(session, inputs)
            loaded = time.perf_counter() - start
            with self.stages.step("run", runtime.name):
                actual = self.actual = self.model().infer(monitor, inputs, reference)
                times = session.timings(len(inputs.labels))
                reached, told = self._fillers(runtime, monitor, actual)
        base["prechecks"] = with_feed_prechecks(base["prechecks"], monitor.prechecks())
        ceiling = self.ceiling()
        with self.stages.step("compare", runtime.name):
            override, device = self.case.bounds(runtime.name), capabilities(runtime).compute != "fp32"
            ours, padded = not self.is_foreign(runtime.kind), monitor.padded()
            context = ComparisonContext(
                base["precision"], override, self.case.seed, floor, device, ours, reached, padded
            )
            verdict = self.model().judge(reference, actual, inputs, context)
            if floor is not None and ceiling is not None and verdict.metrics:
                verdict = verdict.with_power(
                    ceiling.power(floor, verdict.metrics), override.get("accept_low_power", "")
                )
            task = self._task_score(reference, actual) if verdict.metrics else None
        stages = ("export", "compile") if runtime.kind == "qpc" else ("export",) if runtime.kind == "onnx" else ()
        built = {name: self.seconds[name] for name in stages if name in self.seconds}
        file = tuple(self._file_findings(runtime))
        unmeasured = file if verdict.status == "fail" and self._file_may_be_the_cause(runtime) else ()
        return Result(
            **base,
            status=verdict.status,
            reason=". ".join((verdict.reason, *unmeasured)),
            stage="compare" if verdict.status != "pass" else None,
            metrics=verdict.metrics,
            planned=verdict.planned,
            compared=verdict.compared,
            timings_s={**built, "load": round(loaded, 4), **times},
            artifact={
                "kind": artifact.kind,
                "path": str(artifact.path) if artifact.path else None,
                "digest": artifact.digest,
            },
            notes=tuple(inputs.notes),
            findings=(*file, *verdict.findings, *told),
            texts=verdict.texts,
            power=verdict.power,
            task=task,
        )

    def _task_score(self, reference: Tensors, actual: Tensors) -> TaskScore | None:
        """Return what the outputs, which have the structure of the reference, reach on the case's task data."""
        model = self.model()
        return model.task_score(reference, actual, self.inputs()) if isinstance(model, TaskScored) else None

    def _fillers(self, runtime: Runtime, session: Session, actual: Tensors) -> tuple[Sequence[int], Sequence[str]]:
        """Return the rows that change with a token-less row beside them, in a graph of others, and findings."""
        model = self.model()
        foreign_fillers = self.is_foreign(runtime.kind) and self.inputs().tokenless
        if not foreign_fillers or not isinstance(model, FillerChecked):
            return (), ()
        if "DynamicQuantizeLinear" in self.file_precision(runtime.kind).where:
            return (), (
                "activations are quantized with one scale for a whole batch: each row depends on its neighbours",
            )
        return model.reached(session, self.inputs(), actual)

    def relation(self, runtime: Runtime, name: str, *, settings: Settings | None = None) -> Result:
        """Judge a metamorphic relation on one runtime: two ways to run the same rows, compared with each other.

        Args:
            runtime: where.
            name: of the relation.
            settings: that the runtime was made with; what held before is then taken from the store (`kept_relation`).
                None: it is run in any case, as for a runtime that is not the registered one.
        """

        def judge(base: dict[str, Any]) -> Result:
            def run() -> Result:
                return self._related(runtime, name, {**base, "reference": "itself"})

            return run() if settings is None else kept_relation(self, runtime, settings, name, run)

        return self._guarded(runtime, judge)

    def _related(self, runtime: Runtime, name: str, base: dict[str, Any]) -> Result:
        inputs, artifact = self.inputs(), self.artifact(runtime.kind, capabilities(runtime).sdk)
        context = ComparisonContext(base["precision"], self.case.bounds(runtime.name), self.case.seed)
        try:
            with self.stages.step(name, runtime.name), self.opened(runtime, artifact) as session:
                verdict = self.model().relate(name, session, inputs, context)
        except IncomparableError as exc:
            return Result(**base, status="not_run", reason=str(exc), stage=name)
        return Result(
            **base,
            status=verdict.status,
            reason=verdict.reason,
            stage=name,
            metrics=verdict.metrics,
            planned=verdict.planned,
            compared=verdict.compared,
            findings=(*self._file_findings(runtime), *verdict.findings),
            texts=verdict.texts,
        )

    def record(self, folder: Path) -> Path:
        """Write inputs, reference outputs and floors to ``<folder>/<case>.safetensors``, by one rename.

        Raises:
            ValidateError: the file cannot be written; nothing is left of it.
        """
        stored = self.recorded() if "ids" in self.recorded() else self.stored_inputs()[0]
        floors = [self.floor(precision) for precision in (Precision(compute="fp32"), self.case.precision)]
        measured_parts = {floor.profile: floor.stored() for floor in floors if floor is not None}
        ceiling = self.ceiling()
        measured_parts |= {} if ceiling is None else {"ceiling": ceiling.stored()}
        extra = parts(measured_parts)
        if self.case.artifacts.reference is None:
            extra[ABOUT] = self._provenance()
        elif ABOUT in self.recorded():
            extra[ABOUT] = self.recorded()[ABOUT]
        tensors = {**{n: stored[n] for n in stored if is_input(n)}, **self.reference(), **extra}
        path = folder / f"{self.case.name}.safetensors"
        temporary = temporary_beside(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(temporary, sealed(tensors))
            os.replace(temporary, path)
        except OSError as exc:
            raise ValidateError(f"cannot write {path}: {exc.strerror or exc}") from exc
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return path

    def _provenance(self) -> Array:
        """Return what inputs and reference are made from, as a recorded file keeps it."""
        model = self.model()
        provenance: dict[str, Any] = {"model": self.body_key()}
        if isinstance(model, Prechecked):
            provenance["tokens"] = {"asked": model.asked(), "tokenizer": model.tokenizer_key()}
        return json_tensor(provenance)
