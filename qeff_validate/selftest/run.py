# SPDX-License-Identifier: Apache-2.0
"""Measures the verdicts themselves: runs every mutant through the whole pipeline, and other checkers beside it.

In float32 module and pooling mutants run on PyTorch; graph, session and adapter mutants run on ONNX Runtime. In the
precision of the device all of them run as compiled programs on the simulated card. A mutant is equivalent only by rule:
its effect in float64 is below twice the floor of the precision on every row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qeff_validate.artifact import Artifact
from qeff_validate.builders.export_onnx import export_onnx
from qeff_validate.comparison.decisive_rows import MOST
from qeff_validate.config.case import Artifacts, Case, Precision
from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.mutation.mutant import (
    AdapterMutant,
    GraphMutant,
    Inapplicable,
    Mutant,
    Patch,
    PoolingMutant,
    SessionMutant,
    mutants,
)
from qeff_validate.mutation.power import EQUIVALENT, SIZES
from qeff_validate.protocols import Session, model_kind, runtime
from qeff_validate.report.result import Result
from qeff_validate.selftest.baseline_checkers import EMBEDDING_CHECKERS, LOGIT_CHECKERS
from qeff_validate.selftest.equivalent_variants import VARIANTS, seeded
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Tensors

Stage = Literal["fp32", "device"]
STAGES: tuple[Stage, ...] = ("fp32", "device")

GOALS: Mapping[str, float] = {"fp32": 0.98, "device": 0.90}
"""Share of the mutants above the noise that must be caught, by stage."""

Verdict = Literal["caught", "survived", "equivalent", "inapplicable"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one mutant of one case at one stage.

    Attributes:
        effect: its greatest error on a row, in float64 where the original model can have the fault.
        floor: the noise floor of the metric that measures the effect.
        gates: names of the metrics that exceeded their bounds.
        others: for each other checker, whether it passes the mutant.
    """

    case: str
    stage: Stage
    mutant: str
    family: str
    level: str
    verdict: Verdict
    effect: float = float("nan")
    floor: float = float("nan")
    reason: str = ""
    gates: tuple[str, ...] = ()
    others: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alarm:
    """The result of one legitimate run; a failure or an error is a false alarm."""

    case: str
    variant: str
    stage: str
    status: str
    reason: str
    others: Mapping[str, bool] = field(default_factory=dict)

    @property
    def false(self) -> bool:
        """True if a run without a fault failed or ended in an error."""
        return self.status in ("fail", "error")


class CaseUnderTest:
    """One case whose verdicts on mutants are measured.

    Args:
        case: healthy.
        pipeline: returns the pipeline of a case (`pipeline.case_pipeline.Pipeline`), all with one store.
        folder: for changed graphs, which are removed afterwards.
    """

    def __init__(self, case: Case, pipeline: Callable[[Case], Any], folder: Path) -> None:
        self.case, self._pipeline, self._folder = case, pipeline, folder
        self._folders = 0
        self._graph_effects: dict[str, float] = {}
        self._clean: dict[str, Tensors] = {}

    @cached_property
    def _torch(self) -> Any:
        """The pipeline whose module is changed; it must never export the case."""
        return self._pipeline(self.case)

    @cached_property
    def _healthy(self) -> Any:
        return self._pipeline(self.case)

    def sampled(self) -> bool:
        """Return True if bounds are measured on a sample of the rows."""
        return bool(self._healthy.sample().choice.left_out)

    def clean(self, stage: Stage) -> Result:
        """Return the verdict on the healthy case."""
        result: Result = self._healthy.result(runtime("ort" if stage == "fp32" else "sim"))
        return result

    @cached_property
    def effects(self) -> Mapping[str, float]:
        """The size of the effect of each mutant on the original model in float64, by name."""
        model, inputs, reference, exact = (
            self._healthy.model(), self._healthy.inputs(), self._healthy.reference(), self._healthy.exact()
        )  # fmt: skip
        # session mutants of a language model change a decode loop, which the original model does not have
        stateful = model_kind(self.case).stateful
        applicable = [
            mutant
            for mutant in mutants(self.case.model)
            if mutant.level != "graph" and (mutant.ceiling or mutant.level != "session" or not stateful)
        ]
        with np.errstate(all="ignore"):
            runs = model.faulty_runs(inputs, reference, applicable, dtype="float64")
            return {name: self._size(exact, outputs) for name, outputs in runs}

    def _graph_effect(self, mutant: GraphMutant) -> float:
        """Return the size of a graph mutant's effect, from the changed graph in float64."""
        import onnx

        from qeff_validate.selftest.float64_graph import Float64Session

        if mutant.name not in self._graph_effects:
            model, graph = self._healthy.model(), onnx.load(str(self._healthy.onnx().path))
            mutant.change(graph)
            session = Float64Session(graph, self._healthy.graph().buckets)
            outputs = model.infer(session, self._healthy.inputs(), self._healthy.reference())
            self._graph_effects[mutant.name] = self._size(self._healthy.exact(), outputs)
        return self._graph_effects[mutant.name]

    def _size(self, expected: Tensors, outputs: Tensors) -> float:
        """Return the greatest error of a row; infinity if the shapes differ."""
        try:
            with np.errstate(all="ignore"):
                errors = self._healthy.model().measure(expected, outputs, self._healthy.inputs())
        except (ValueError, IndexError, KeyError, ValidateError):
            return float("inf")
        size = float(next(errors[name] for name in SIZES if name in errors))
        if "again" in expected:  # second visits, which no metric of rows covers
            first, second = expected["again"].astype(float), outputs["again"].astype(float)
            size = float(np.max([size, np.abs(first - second).max()]))
        return size

    def outcome(self, mutant: Mutant, stage: Stage) -> Outcome:
        """Run one mutant, and judge it by our bounds and by the other checkers."""
        key = (self.case.name, stage, mutant.name, mutant.family, mutant.level)
        try:
            result, actual = self._run(mutant, stage)
        except ValidateError as exc:  # there is nothing to change, or no exporter accepts the change
            return Outcome(*key, "inapplicable", reason=str(exc))
        precision = Precision(compute="fp32") if stage == "fp32" else self.case.precision
        floor = self._healthy.floor(precision)
        level = float(next(floor.level(name) for name in SIZES if name in floor.errors))
        effect = self.effects.get(mutant.name, float("nan"))
        if isinstance(mutant, GraphMutant):
            effect = self._graph_effect(mutant)
        elif mutant.name not in self.effects and actual:
            effect = self._size({**self._healthy.exact(), **self._clean_outputs(stage)}, actual)
        exceeded = tuple(item.metric.name.rpartition(".")[2] for item in result.metrics if not item.passed)
        verdict: Verdict = "caught" if result.status in ("fail", "error") else "survived"
        if effect < EQUIVALENT * level:
            verdict = "equivalent"  # too small for a verdict to be right or wrong
        others = baseline_verdicts(self._healthy, actual, precision.profile) if actual else {}
        reason = result.reason.splitlines()[0] if result.reason else ""
        return Outcome(*key, verdict, effect, level, reason or _nearest(result), exceeded, others)

    def _clean_outputs(self, stage: Stage) -> Tensors:
        if stage not in self._clean:
            self.clean(stage)
            self._clean[stage] = self._healthy.actual
        return self._clean[stage]

    # --- artifacts with a mutant ----------------------------------------------------------

    def _run(self, mutant: Mutant, stage: Stage) -> tuple[Result, Tensors]:
        if isinstance(mutant, AdapterMutant | SessionMutant):
            return self._in_session(mutant, "ort" if stage == "fp32" else "sim")
        if isinstance(mutant, GraphMutant):
            return self._from_graph(stage, lambda path: changed_graph(mutant, self._healthy.onnx(), path))
        if stage == "fp32":
            with self._in_module(mutant):
                self._torch.actual = {}
                return self._torch.result(runtime("torch")), self._torch.actual
        return self._from_graph(stage, lambda path: self._exported(mutant, path))

    def _in_session(self, mutant: AdapterMutant | SessionMutant, name: str) -> tuple[Result, Tensors]:
        errors: list[Inapplicable] = []
        fault: Callable[..., Any] = mutant.change
        if model_kind(self.case).stateful:
            from qeff_validate.mutation.causal_lm_mutants import serving

            fault = serving(mutant, self._healthy.inputs().adapters)
        self._healthy.actual = {}
        result = self._healthy.result(FaultyRuntime(lambda session: InapplicableRecorder(session, fault, errors), name))
        if errors:
            raise errors[0]
        return result, self._healthy.actual

    @contextmanager
    def _in_module(self, mutant: Mutant) -> Iterator[Any]:
        """Apply a mutant to the wrapper's module for the duration of the context."""
        module = self._torch.loaded()[0]
        with ExitStack() as stack:
            if isinstance(mutant, PoolingMutant):
                if module.pooling == "none":
                    raise Inapplicable("there is no pooling")
                patch, change = stack.enter_context(Patch()), mutant.change
                if isinstance(module.pooling, tuple):  # the vectors of several poolings are concatenated
                    patch.attribute(module, "pool", lambda *inputs: change(*inputs).repeat(1, len(module.pooling)))
                else:
                    patch.attribute(module, "pool", change)
            else:
                stack.enter_context(mutant.applied_to(getattr(module, "base_model", None) or module.model))
            yield module

    def _exported(self, mutant: Mutant, path: Path) -> None:
        with self._in_module(mutant) as module:
            examples = self._torch.loaded()[1]
            exporters: tuple[Any, ...] = model_kind(self.case).exporters[::-1]  # TorchScript's is faster
            for exporter in exporters:
                try:
                    export_onnx(module, examples, self._torch.graph(), path.parent, exporter)
                except ValidateError:
                    if exporter == exporters[-1]:
                        raise
                else:
                    return

    def _from_graph(self, stage: Stage, write: Callable[[Path], None]) -> tuple[Result, Tensors]:
        self._folders += 1
        folder = self._folder / f"{self.case.name}-{self._folders}"
        folder.mkdir(parents=True)
        try:
            write(folder / "model.onnx")
            case = self.case.model_copy(update={"artifacts": Artifacts(onnx=str(folder / "model.onnx"))})
            pipeline = self._pipeline(case)
            return pipeline.result(runtime("ort" if stage == "fp32" else "sim")), pipeline.actual
        finally:
            shutil.rmtree(folder)


class InapplicableRecorder(SessionWrapper):
    """A session with a fault that records `Inapplicable`, which a pipeline reports like any error.

    Args:
        session: the healthy one.
        fault: takes the session and returns the one with the fault.
        errors: receives the exceptions.
    """

    def __init__(self, session: Session, fault: Callable[[Session], Session], errors: list[Inapplicable]) -> None:
        self._errors = errors
        with self._recording():
            super().__init__(fault(session))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except Inapplicable as exc:
            self._errors.append(exc)
            raise

    def run(self, feeds: Tensors, *, fetch: Any = None) -> Tensors:
        """Run with the fault."""
        with self._recording():
            return super().run(feeds, fetch=fetch)


def baseline_verdicts(pipeline: Any, actual: Tensors, profile: str) -> dict[str, bool]:
    """Return for each other checker whether it passes a pipeline's outputs."""
    name, inputs = pipeline.graph().outputs[0].name, pipeline.inputs()
    expected, outputs = pipeline.reference()[name], actual[name]
    if len(outputs) == len(expected) and expected.ndim == 2:
        with_tokens = [row for row in range(len(expected)) if row not in inputs.tokenless]
        expected, outputs = expected[with_tokens], outputs[with_tokens]
    passed = {}
    for title, check in (LOGIT_CHECKERS if name == "logits" else EMBEDDING_CHECKERS).items():
        try:
            passed[title] = bool(check(expected, outputs, profile))
        except (ValueError, IndexError):
            passed[title] = False
    return passed


def changed_graph(mutant: GraphMutant, artifact: Artifact, path: Path) -> None:
    """Write a graph with a fault, weights included."""
    import onnx

    model = onnx.load(str(artifact.path))
    mutant.change(model)
    onnx.save(model, str(path))


def _nearest(result: Result) -> str:
    """Return a sentence about the metric nearest to its bound."""
    gates = [item for item in result.metrics if item.bound is not None and item.bound.value > 0]
    if not gates:
        return ""
    shares = [item.metric.value / item.bound.value if item.bound else 0.0 for item in gates]
    nearest = gates[int(np.argmax(shares))]  # the first NaN, if there is one
    assert nearest.bound is not None
    return f"nearest bound: {nearest.metric.name} {nearest.metric.value:.2e} of {nearest.bound.value:.2e}"


def run_mutants(
    case: Case, pipeline: Callable[[Case], Any], folder: Path, say: Callable[[str], None], stages: Sequence[Stage]
) -> Iterator[Outcome]:
    """Yield the outcome of every mutant of a case.

    Raises:
        ValidateError: the healthy case does not pass, so faults in it prove nothing.
    """
    under_test = CaseUnderTest(case, pipeline, folder)
    if under_test.sampled():
        raise ConfigError(f"case {case.name!r}: selftest compares every row in float64: give it at most {MOST} texts")
    for stage in stages:
        clean = under_test.clean(stage)
        if clean.status != "pass":
            raise ValidateError(f"case {case.name!r} does not pass without a fault: {clean.status}: {clean.reason}")
        table = mutants(case.model)
        for number, mutant in enumerate(table, start=1):
            say(f"{case.name}, {stage}, mutant {number} of {len(table)}: {mutant.name}")
            yield under_test.outcome(mutant, stage)


def run_variants(
    cases: Sequence[Case],
    seeds: int,
    make_pipeline: Callable[[Case], Any],
    folder: Path,
    say: Callable[[str], None],
    stages: Sequence[Stage],
) -> Iterator[Alarm]:
    """Yield the verdict on every legitimate variant for each of some seeds; the cases take turns."""
    for seed in range(1, seeds + 1):
        case = seeded(cases[seed % len(cases)], 1000 + seed)
        for variant in VARIANTS:
            if case.model not in variant.kinds or variant.precision not in stages:
                continue
            say(f"{case.name}: {variant.name}")
            pipeline, result = variant.run(make_pipeline, case, folder)
            profile = "fp32" if variant.precision == "fp32" else case.precision.profile
            others = baseline_verdicts(pipeline, pipeline.actual, profile) if pipeline.actual else {}
            yield Alarm(case.name, variant.name, variant.precision, result.status, result.reason, others)
