# SPDX-License-Identifier: Apache-2.0
"""Measures the verdicts themselves: every mutant through the whole pipeline, and beside it what other checks say.

In float32 a mutant of the modules or of the pooling runs on PyTorch, one of a graph, of what is fed, given or served on
ONNX Runtime; in the precision of the device all of them run as compiled programs on the simulated card. A mutant is
equivalent only by rule: its effect in float64 is below twice the floor of the precision on every row.
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
from qeff_validate.protocols import Session, runtime
from qeff_validate.report.result import Result
from qeff_validate.selftest.baseline_checkers import OTHERS, OTHERS_LM
from qeff_validate.selftest.equivalent_variants import VARIANTS, seeded
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Tensors

Stage = Literal["fp32", "device"]
STAGES: tuple[Stage, ...] = ("fp32", "device")

GOALS: Mapping[str, float] = {"fp32": 0.98, "device": 0.90}
"""Which share of the mutants that are no noise must be caught, by stage."""

Verdict = Literal["caught", "survived", "equivalent", "inapplicable"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one mutant of one case at one stage.

    Attributes:
        effect: its greatest error on a row, in float64 where the original model can have the fault.
        floor: what is usual there for legitimate runs.
        gates: names of the metrics whose bounds it broke.
        others: whether each other check lets it pass.
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
    """What came of one legitimate run; it is a false alarm unless it passed."""

    case: str
    variant: str
    stage: str
    status: str
    reason: str
    others: Mapping[str, bool] = field(default_factory=dict)

    @property
    def false(self) -> bool:
        """Say whether a run without a fault was called faulty, or could not be made."""
        return self.status in ("fail", "error")


class Examined:
    """One case under examination.

    Args:
        case: healthy.
        pipeline: makes the pipeline of a case (`pipeline.Pipeline`), all with one store.
        folder: for graphs that are changed; what is written there is taken away again.
    """

    def __init__(self, case: Case, pipeline: Callable[[Case], Any], folder: Path) -> None:
        self.case, self._pipeline, self._folder = case, pipeline, folder
        self._made = 0
        self._effects_of_graphs: dict[str, float] = {}
        self._clean: dict[str, Tensors] = {}

    @cached_property
    def _torch(self) -> Any:
        """The pipeline whose module is changed; it must never export."""
        return self._pipeline(self.case)

    @cached_property
    def _healthy(self) -> Any:
        return self._pipeline(self.case)

    def sampled(self) -> bool:
        """Return True if bounds are measured on some of the rows alone."""
        return bool(self._healthy.sample().choice.left_out)

    def clean(self, stage: Stage) -> Result:
        """Return the verdict on the healthy case."""
        found: Result = self._healthy.result(runtime("ort" if stage == "fp32" else "sim"))
        return found

    @cached_property
    def effects(self) -> Mapping[str, float]:
        """The size of each mutant's effect on the original model in float64."""
        made, inputs, reference, exact = (
            self._healthy.model(), self._healthy.inputs(), self._healthy.reference(), self._healthy.exact()
        )  # fmt: skip
        # a language model's session mutants act on a decode loop, which the original does not have
        stateful = self.case.model != "embedding"
        some = [
            mutant
            for mutant in mutants(self.case.model)
            if mutant.level != "graph" and (mutant.ceiling or mutant.level != "session" or not stateful)
        ]
        with np.errstate(all="ignore"):
            altered = made.faulty_runs(inputs, reference, some, dtype="float64")
            return {name: self._size(exact, outputs) for name, outputs in altered}

    def _effect_of_graph(self, mutant: GraphMutant) -> float:
        """Return the size of a graph mutant's effect: the changed graph itself is run in float64."""
        import onnx

        from qeff_validate.selftest.float64_graph import WideSession

        if mutant.name not in self._effects_of_graphs:
            made, graph = self._healthy.model(), onnx.load(str(self._healthy.onnx().path))
            mutant.change(graph)
            wide = WideSession(graph, made.graph.buckets)
            found = made.infer(wide, self._healthy.inputs(), self._healthy.reference())
            self._effects_of_graphs[mutant.name] = self._size(self._healthy.exact(), found)
        return self._effects_of_graphs[mutant.name]

    def _size(self, wanted: Tensors, outputs: Tensors) -> float:
        """Return the greatest error of a row; infinity if outputs are not even alike in shape."""
        try:
            with np.errstate(all="ignore"):
                errors = self._healthy.model().measure(wanted, outputs, self._healthy.inputs())
        except (ValueError, IndexError, KeyError, ValidateError):
            return float("inf")
        size = float(next(errors[name] for name in SIZES if name in errors))
        if "again" in wanted:  # second visits, which no metric of rows looks at
            first, second = wanted["again"].astype(float), outputs["again"].astype(float)
            size = float(np.max([size, np.abs(first - second).max()]))
        return size

    def outcome(self, mutant: Mutant, stage: Stage) -> Outcome:
        """Run one mutant, and judge it by our bounds and by other checks."""
        about = (self.case.name, stage, mutant.name, mutant.family, mutant.level)
        try:
            result, actual = self._judged(mutant, stage)
        except ValidateError as exc:  # nothing to change, or nothing that an exporter would take
            return Outcome(*about, "inapplicable", reason=str(exc))
        precision = Precision(compute="fp32") if stage == "fp32" else self.case.precision
        floor = self._healthy.floor(precision)
        level = float(next(floor.level(name) for name in SIZES if name in floor.errors))
        effect = self.effects.get(mutant.name, float("nan"))
        if isinstance(mutant, GraphMutant):
            effect = self._effect_of_graph(mutant)
        elif mutant.name not in self.effects and actual:
            effect = self._size({**self._healthy.exact(), **self._clean_outputs(stage)}, actual)
        broken = tuple(item.metric.name.rpartition(".")[2] for item in result.metrics if not item.passed)
        verdict: Verdict = "caught" if result.status in ("fail", "error") else "survived"
        if effect < EQUIVALENT * level:
            verdict = "equivalent"  # so small that to see it or not is no merit
        others = elsewhere(self._healthy, actual, precision.profile) if actual else {}
        reason = result.reason.splitlines()[0] if result.reason else ""
        return Outcome(*about, verdict, effect, level, reason or _nearest(result), broken, others)

    def _clean_outputs(self, stage: Stage) -> Tensors:
        if stage not in self._clean:
            self.clean(stage)
            self._clean[stage] = self._healthy.actual
        return self._clean[stage]

    # --- how a mutant gets into an artifact ----------------------------------------------------------

    def _judged(self, mutant: Mutant, stage: Stage) -> tuple[Result, Tensors]:
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
        noted: list[Inapplicable] = []
        damage: Callable[..., Any] = mutant.change
        if self.case.model != "embedding":
            from qeff_validate.mutation.causal_lm_mutants import serving

            damage = serving(mutant, self._healthy.inputs().adapters)
        self._healthy.actual = {}
        result = self._healthy.result(FaultyRuntime(lambda session: Noting(session, damage, noted), name))
        if noted:
            raise noted[0]
        return result, self._healthy.actual

    @contextmanager
    def _in_module(self, mutant: Mutant) -> Iterator[Any]:
        """Hold a mutant in the wrapper's module."""
        module = self._torch.loaded()[0]
        with ExitStack() as held:
            if isinstance(mutant, PoolingMutant):
                if module.pooling == "none":
                    raise Inapplicable("there is no pooling")
                patch = held.enter_context(Patch())
                patch.attribute(module, "pool", mutant.change)
            else:
                held.enter_context(mutant.applied_to(getattr(module, "base_model", None) or module.model))
            yield module

    def _exported(self, mutant: Mutant, path: Path) -> None:
        with self._in_module(mutant) as module:
            examples = self._torch.loaded()[1]
            exporters: tuple[Any, ...] = ("torchscript", "dynamo") if self.case.model == "embedding" else ("dynamo",)
            for exporter in exporters:
                try:
                    export_onnx(module, examples, self._torch.model().graph, path.parent, exporter)
                except ValidateError:
                    if exporter == exporters[-1]:
                        raise
                else:
                    return

    def _from_graph(self, stage: Stage, write: Callable[[Path], None]) -> tuple[Result, Tensors]:
        self._made += 1
        folder = self._folder / f"{self.case.name}-{self._made}"
        folder.mkdir(parents=True)
        try:
            write(folder / "model.onnx")
            case = self.case.model_copy(update={"artifacts": Artifacts(onnx=str(folder / "model.onnx"))})
            brought = self._pipeline(case)
            return brought.result(runtime("ort" if stage == "fp32" else "sim")), brought.actual
        finally:
            shutil.rmtree(folder)


class Noting:
    """A damaged session that notes when the damage does not apply, which a pipeline takes for an error."""

    def __init__(self, session: Session, damage: Callable[[Session], Session], noted: list[Inapplicable]) -> None:
        self._noted = noted
        with self._noting():
            self._session = damage(session)
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Inapplicable as exc:
            self._noted.append(exc)
            raise

    def run(self, feeds: Tensors, *, fetch: Any = None) -> Tensors:
        """Run with the damage."""
        with self._noting():
            return self._session.run(feeds, fetch=fetch)

    def reset(self) -> None:
        """Forget retained state."""
        self._session.reset()


def elsewhere(pipeline: Any, actual: Tensors, profile: str) -> dict[str, bool]:
    """Say which other checks let a pipeline's outputs pass."""
    name, inputs = pipeline.model().graph.outputs[0].name, pipeline.inputs()
    wanted, got = pipeline.reference()[name], actual[name]
    if len(got) == len(wanted) and wanted.ndim == 2:
        kept = [row for row in range(len(wanted)) if row not in inputs.tokenless]
        wanted, got = wanted[kept], got[kept]
    found = {}
    for title, check in (OTHERS if pipeline.case.model == "embedding" else OTHERS_LM).items():
        try:
            found[title] = bool(check(wanted, got, profile))
        except (ValueError, IndexError):
            found[title] = False
    return found


def changed_graph(mutant: GraphMutant, artifact: Artifact, path: Path) -> None:
    """Write a graph with a fault, weights inside."""
    import onnx

    model = onnx.load(str(artifact.path))
    mutant.change(model)
    onnx.save(model, str(path))


def _nearest(result: Result) -> str:
    """Say which bound a mutant that passed came nearest to."""
    gates = [item for item in result.metrics if item.bound is not None and item.bound.value > 0]
    if not gates:
        return ""
    shares = [item.metric.value / item.bound.value if item.bound else 0.0 for item in gates]
    near = gates[int(np.argmax(shares))]  # the first NaN, if there is one
    assert near.bound is not None
    return f"nearest bound: {near.metric.name} {near.metric.value:.2e} of {near.bound.value:.2e}"


def examine(
    case: Case, pipeline: Callable[[Case], Any], folder: Path, say: Callable[[str], None], stages: Sequence[Stage]
) -> Iterator[Outcome]:
    """Yield the outcome of every mutant of a case.

    Raises:
        ValidateError: the healthy case does not pass, so faults in it prove nothing.
    """
    examined = Examined(case, pipeline, folder)
    if examined.sampled():
        raise ConfigError(f"case {case.name!r}: selftest compares every row in float64: give it at most {MOST} texts")
    for stage in stages:
        clean = examined.clean(stage)
        if clean.status != "pass":
            raise ValidateError(f"case {case.name!r} does not pass without a fault: {clean.status}: {clean.reason}")
        found = mutants(case.model)
        for at, mutant in enumerate(found, start=1):
            say(f"{case.name}, {stage}, mutant {at} of {len(found)}: {mutant.name}")
            yield examined.outcome(mutant, stage)


def sound(
    cases: Sequence[Case],
    seeds: int,
    pipeline: Callable[[Case], Any],
    folder: Path,
    say: Callable[[str], None],
    stages: Sequence[Stage],
) -> Iterator[Alarm]:
    """Yield the verdict on every legitimate variant, with as many seeds; the cases take turns."""
    for seed in range(1, seeds + 1):
        case = seeded(cases[seed % len(cases)], 1000 + seed)
        for variant in VARIANTS:
            if case.model not in variant.kinds or variant.precision not in stages:
                continue
            say(f"{case.name}: {variant.name}")
            made, result = variant.judged(pipeline, case, folder)
            profile = "fp32" if variant.precision == "fp32" else case.precision.profile
            others = elsewhere(made, made.actual, profile) if made.actual else {}
            yield Alarm(case.name, variant.name, variant.precision, result.status, result.reason, others)
