# SPDX-License-Identifier: Apache-2.0
"""One case's way from inputs to results: inputs → reference → artifact → session → tensors → verdict."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qeff_validate.artifact import Artifact, Kind, fingerprint
from qeff_validate.builders.provenance import read_provenance
from qeff_validate.builders.source_keys import code_key, measures_key
from qeff_validate.builders.store import Entry, Store
from qeff_validate.comparison.decisive_rows import MOST, DecisiveRows, decisive_rows
from qeff_validate.comparison.noise_floor import Floor, check_floor, digest_of
from qeff_validate.config.case import Case, Precision
from qeff_validate.errors import ConfigError, IncomparableError, UnstableReferenceError, ValidateError
from qeff_validate.files import temporary_beside
from qeff_validate.json_tensor import json_tensor
from qeff_validate.models.framework_calls import versions
from qeff_validate.mutation.power import FaultEffects, faults_key, measure_fault_effects
from qeff_validate.pipeline.expectations import with_expectation
from qeff_validate.pipeline.measure_floor import Sample, measure_floor
from qeff_validate.pipeline.memory import release_memory, trim_memory
from qeff_validate.pipeline.recorded_file import is_input, naming, outputs_of, part, parts, read_recorded, sealed
from qeff_validate.pipeline.stages import Progress, Stages
from qeff_validate.pipeline.timing import TimedSession
from qeff_validate.pipeline.user_artifacts import user_artifact
from qeff_validate.prechecks.checks import ABOUT, collect_evidence, run_prechecks, with_feed_prechecks, with_prechecks
from qeff_validate.prechecks.feed_monitor import FeedMonitor
from qeff_validate.prechecks.graph_precision import GraphPrecision, combined, graph_precision, measurable
from qeff_validate.protocols import ComparisonContext, Model, Runtime, Session, capabilities, model_kind
from qeff_validate.report.result import Precheck, Result
from qeff_validate.runtimes.renamed_session import RenamedSession
from qeff_validate.sdk.locate import Sdk
from qeff_validate.tensors import Array, Tensors, save_tensors


class Pipeline:
    """One case's way from inputs to results; each stage happens once, and what failed stays failed."""

    def __init__(
        self,
        case: Case,
        options: Any,
        store: Store,
        progress: Progress,
        *,
        model: Any = None,
        tokenizer: Any = None,
        wrapper: Model | None = None,
    ) -> None:
        self.case, self.options, self.store, self.progress = case, options, store, progress
        self._given, self._tokenizer, self._wrapper = model, tokenizer, wrapper
        self.stages = Stages(case.name, progress)
        self.seconds: dict[str, float] = {}
        self.actual: Tensors = {}
        """What the last runtime gave, for who looks closer."""

    def result(self, adapter: Runtime) -> Result:
        """Run and judge the case on one runtime; whatever goes wrong becomes a result."""
        result = self._guarded(adapter, lambda base: self._judged(adapter, base))
        trim_memory()  # only now nothing holds the session
        return with_expectation(self.case, result)

    def _guarded(self, adapter: Runtime, judge: Callable[[dict[str, Any]], Result]) -> Result:
        base: dict[str, Any] = {"case": self.case.name, "runtime": adapter.name}
        try:
            missing = adapter.probe()
            if missing:
                return Result(**base, status="not_run", reason=missing)
            base["simulated"] = capabilities(adapter).simulated
            base["reference"] = "hf" if self.case.artifacts.reference is None else "recorded"
            base["precision"] = self._precision(adapter).profile
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

    def _precision(self, adapter: Runtime) -> Precision:
        """Return what a runtime computes in, by its capabilities; a user's file has a precision of its own."""
        compute = capabilities(adapter).compute
        asked = self.case.precision if compute is None else Precision(compute=compute)
        return combined(asked, self._file_precision(adapter.kind))

    def _file_precision(self, kind: Kind) -> GraphPrecision:
        """Return what the user's ONNX file computes in; float32 where there is none."""
        brought = self.case.artifacts
        if kind == "module" or brought.onnx is None or (kind == "qpc" and brought.qpc is not None):
            return GraphPrecision()
        path = Path(brought.onnx)
        self._adopted("onnx", path)  # a bomb of functions, a pipe or a device is refused before anything opens it
        return self.stages.once("file.precision", lambda: graph_precision(path), "precision of the file")

    def _file_may_be_the_cause(self, adapter: Runtime) -> bool:
        """Return whether a user's file rounds in ways that no bound allows for."""
        file = self._file_precision(adapter.kind)
        return bool(file.weights) or (bool(file.where) and self._precision(adapter).compute == "fp32")

    def _file_findings(self, adapter: Runtime) -> Iterator[str]:
        """Say in what precision a user's file computes, if it is not float32."""
        file = self._file_precision(adapter.kind)
        if file != GraphPrecision():
            precision = self._precision(adapter)
            said = f"the bounds are those of {precision.profile}" if measurable(precision) else "no noise is measured"
            yield f"the file computes in {file.words} ({file.where}); {said}"

    def _judged(self, adapter: Runtime, base: dict[str, Any]) -> Result:
        base["prechecks"] = prechecks = self.prechecks(adapter.kind)
        try:
            result = self._numbers(adapter, base)
        except Exception as exc:  # what is known to be wrong is said first, and is mostly why
            if all(precheck.state != "differs" for precheck in prechecks):
                raise
            result = Result(**base, status="error", reason=f"there are none: {exc}")
        return with_prechecks(result)

    def prechecks(self, kind: Kind) -> tuple[Precheck, ...]:
        """Compare what a runtime opens, and the reference, with what the case asks for; nothing is built or run."""

        def compare() -> tuple[Precheck, ...]:
            brought = self.case.artifacts
            if kind == "qpc" and brought.qpc is not None:
                self._adopted("qpc", brought.qpc)
            elif kind != "module" and brought.onnx is not None:
                self._adopted("onnx", brought.onnx)  # a pipe or a device among its files must not be opened
            recorded = None if self.case.artifacts.reference is None else self._recorded()
            in_memory = self._given is not None
            evidence = collect_evidence(self.case, kind, self.model(), recorded, in_memory=in_memory)
            return run_prechecks(self.model(), self.inputs(), evidence, lambda: self._body_key()["body"])

        return self.stages.once(f"prechecks.{kind}", compare, f"prechecks for {kind}")

    def _numbers(self, adapter: Runtime, base: dict[str, Any]) -> Result:
        inputs = self.inputs()
        reference, precision = self.reference(), self._precision(adapter)
        floor = self.floor(precision) if measurable(precision) else None
        artifact = self.artifact(adapter.kind, capabilities(adapter).sdk)
        with ExitStack() as held:
            start = time.perf_counter()
            with self.stages.step("load", adapter.name):
                session = TimedSession(held.enter_context(self._opened(adapter, artifact)))
                monitor = FeedMonitor(session, inputs)
            loaded = time.perf_counter() - start
            with self.stages.step("run", adapter.name):
                actual = self.actual = self.model().infer(monitor, inputs, reference)
                times = session.timings(len(inputs.labels))
                reached, told = self._fillers(adapter, monitor, actual)
        base["prechecks"] = with_feed_prechecks(base["prechecks"], monitor.prechecks())
        ceiling = self.ceiling()
        with self.stages.step("compare", adapter.name):
            override, device = self.case.bounds(adapter.name), capabilities(adapter).compute != "fp32"
            ours, padded = not self._foreign(adapter.kind), monitor.padded()
            context = ComparisonContext(
                base["precision"], override, self.case.seed, floor, device, ours, reached, padded
            )
            verdict = self.model().judge(reference, actual, inputs, context)
            if floor is not None and ceiling is not None and verdict.metrics:
                verdict = verdict.with_power(ceiling.power(floor, verdict.metrics))
        stages = ("export", "compile") if adapter.kind == "qpc" else ("export",) if adapter.kind == "onnx" else ()
        built = {name: self.seconds[name] for name in stages if name in self.seconds}
        file = tuple(self._file_findings(adapter))
        unmeasured = file if verdict.status == "fail" and self._file_may_be_the_cause(adapter) else ()
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
            power=verdict.power,
        )

    def _foreign(self, kind: Kind) -> bool:
        """Return whether a runtime of this kind opens a file of the user's that this library has not exported."""
        brought = self.case.artifacts
        if kind == "qpc" and brought.qpc:
            path = Path(brought.qpc)
            return self.stages.once(
                "qpc.origin", lambda: read_provenance("qpc", path).model is None, "origin of the QPC"
            )
        if kind == "module" or not brought.onnx:
            return False
        path = Path(brought.onnx)
        return self.stages.once(
            "file.origin", lambda: read_provenance("onnx", path).model is None, "origin of the file"
        )

    def _fillers(self, adapter: Runtime, session: Session, actual: Tensors) -> tuple[Sequence[int], Sequence[str]]:
        """Return the rows that change with a token-less row beside them, in a graph of others, and findings."""
        made: Any = self.model()
        if not self._foreign(adapter.kind) or not self.inputs().tokenless or not hasattr(made, "reached"):
            return (), ()
        reached: tuple[Sequence[int], Sequence[str]] = made.reached(session, self.inputs(), actual)
        return reached

    def relation(self, adapter: Runtime, name: str) -> Result:
        """Judge a metamorphic relation on one runtime: two ways to run the same rows, compared with each other."""
        return self._guarded(adapter, lambda base: self._related(adapter, name, {**base, "reference": "itself"}))

    def _related(self, adapter: Runtime, name: str, base: dict[str, Any]) -> Result:
        inputs, artifact = self.inputs(), self.artifact(adapter.kind, capabilities(adapter).sdk)
        context = ComparisonContext(base["precision"], self.case.bounds(adapter.name), self.case.seed)
        try:
            with self.stages.step(name, adapter.name), self._opened(adapter, artifact) as session:
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
            findings=(*self._file_findings(adapter), *verdict.findings),
        )

    @contextmanager
    def session(self, adapter: Runtime) -> Iterator[Session]:
        """Open what a runtime runs for the case."""
        self.inputs()
        artifact = self.artifact(adapter.kind, capabilities(adapter).sdk)
        with self._opened(adapter, artifact) as session:
            yield session

    @contextmanager
    def _opened(self, adapter: Runtime, artifact: Artifact) -> Iterator[Session]:
        """Open an artifact; a user's own stands behind our names."""
        with adapter.open(artifact) as session:
            given = self.case.artifacts
            yield RenamedSession(session, self.model().graph, given) if given.onnx or given.qpc else session

    def model(self) -> Model:
        """Return the model wrapper."""
        if self._wrapper is not None:
            return self._wrapper
        create = model_kind(self.case).create

        def make() -> Model:
            wrapper = create(self.case, self.options, self._given, self._tokenizer)
            if hasattr(wrapper, "share"):
                wrapper.share = self._shared
            return wrapper

        return self.stages.once("model", make)

    def _shared(self, name: str, inputs: Any, run: Callable[[], Tensors]) -> Tensors:
        """Return hidden states of a body, stored by body and token ids: cases with other poolings read them too."""
        ids = {"ids": digest_of({str(row): tokens for row, tokens in enumerate(inputs.ids)}), "pad": inputs.pad}
        made = {"body": self._body_key()["body"], **versions("torch"), "code": code_key()}
        key = {"name": name, **ids, **made, "faults": faults_key() if name.startswith("faults") else None}
        return self.store.tensors("states", key, run)[0]

    def inputs(self) -> Any:
        """Return the model's inputs: recorded ones, else stored by texts and tokenizer."""
        recorded = self._recorded()
        if "ids" in recorded:

            def read() -> Any:
                with naming(self.case.artifacts.reference):
                    return self.model().inputs(recorded)

            return self.stages.once("inputs", read)
        return self.stages.once("inputs", lambda: self.model().inputs(self._inputs()[0]))

    def _recorded(self) -> Tensors:
        """Return the tensors of ``artifacts: {reference: …}``; none if the case names no such file."""
        path = self.case.artifacts.reference
        return {} if path is None else self.stages.once("recorded", lambda: read_recorded(Path(path)))

    def record(self, folder: Path) -> Path:
        """Write inputs, reference outputs and floors to ``<folder>/<case>.safetensors``, by one rename.

        Raises:
            ValidateError: the file cannot be written; nothing is left of it.
        """
        stored = self._recorded() if "ids" in self._recorded() else self._inputs()[0]
        floors = [self.floor(precision) for precision in (Precision(compute="fp32"), self.case.precision)]
        measured_parts = {floor.profile: floor.stored() for floor in floors if floor is not None}
        ceiling = self.ceiling()
        measured_parts |= {} if ceiling is None else {"ceiling": ceiling.stored()}
        extra = parts(measured_parts)
        if self.case.artifacts.reference is None:
            extra[ABOUT] = self._about()
        elif ABOUT in self._recorded():
            extra[ABOUT] = self._recorded()[ABOUT]
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

    def _about(self) -> Array:
        """Return what inputs and reference are made from, as a recorded file keeps it."""
        made: Any = self.model()
        said: dict[str, Any] = {"model": self._body_key()}
        if hasattr(made, "settings"):
            said["tokens"] = {"asked": made.asked(), "tokenizer": made.tokenizer_key()}
        return json_tensor(said)

    def _inputs(self) -> tuple[Tensors, Entry]:
        made = self.model()
        return self.stages.once(
            "tokenize", lambda: self.store.tensors("inputs", {**made.inputs_key(), "code": code_key()}, made.tokenize)
        )

    def _reference_key(self, dtype: str) -> dict[str, Any]:
        made = self._body_key()
        return {"model": made, "inputs": self._inputs()[1].digest, "dtype": dtype, "code": code_key()}

    def _body_key(self) -> Mapping[str, Any]:
        return self.stages.once("fingerprint", lambda: {**self.model().fingerprint(), **versions("torch")})

    def reference(self) -> Tensors:
        """Return the float32 outputs of the Hugging Face model, stored by model and inputs."""

        def make() -> Tensors:
            return self.model().reference(self.inputs(), dtype="float32")

        if self.case.artifacts.reference is not None:
            return self.stages.once("reference.recorded", self._recorded_outputs, "recorded reference")
        return self.stages.once(
            "reference",
            lambda: self.store.tensors("reference", self._reference_key("float32"), make)[0],
            "reference",
            shown=True,
        )

    def _recorded_outputs(self) -> Tensors:
        outputs, model = outputs_of(self._recorded()), self.model()
        if hasattr(model, "check_recorded"):
            with naming(self.case.artifacts.reference):
                model.check_recorded(outputs, self.inputs())
        return outputs

    def exact(self) -> Tensors:
        """Return the float64 outputs of the Hugging Face model for the rows that are measured, stored."""

        def make() -> Tensors:
            made = self.model().reference(self.sample().inputs, dtype="float64")
            release_memory()
            return made

        def get() -> Tensors:
            return self.store.tensors("reference", self._measured_key(), make)[0]

        return self.stages.once("reference.float64", get, "reference in float64", shown=True)

    def sample(self) -> Sample:
        """Return the rows that floor and faults are measured on: all of them, if they are few."""
        made: Any = self.model()

        def choose() -> Sample:
            inputs, reference = self.inputs(), self.reference()
            if not hasattr(made, "subset"):
                return Sample(inputs, reference, None, DecisiveRows(()))
            lengths = [tokens.size for tokens in inputs.ids]
            few = len(lengths) <= MOST
            choice = decisive_rows(lengths, () if few else made.sensitivity(inputs, reference), self.case.seed)
            if not choice.left_out:
                return Sample(inputs, reference, None, choice)
            some, wanted, rows = made.subset(inputs, reference, choice.rows)
            return Sample(some, wanted, rows, choice)

        return self.stages.once("sample", choose, "rows to measure")

    def _measured_key(self) -> dict[str, Any]:
        choice = self.sample().choice
        return {**self._reference_key("float64"), "texts": list(choice.rows) if choice.left_out else None}

    def floor(self, precision: Precision) -> Floor | None:
        """Return how far legitimate runs of the original model are off in a precision, stored by model and inputs.

        None if the case wants the bounds of the table, or if there is no original model to run.

        Raises:
            IncomparableError: a recorded floor belongs to another reference.
        """
        profile, made = precision.profile, self.model()
        if self.case.tolerance == "table":
            return None
        if self.case.artifacts.reference is not None:
            stored, reference = part(self._recorded(), profile), self.reference()
            with naming(self.case.artifacts.reference):
                return check_floor(Floor.from_stored(stored), reference, profile) if stored else None
        if not hasattr(made, "ensemble"):
            return None

        def make() -> Tensors:
            return measure_floor(made, self.exact(), self.sample(), precision, digest_of(self.reference())).stored()

        key = {**self._measured_key(), "precision": precision.model_dump(mode="json"), "measures": measures_key()}

        def get() -> Floor:
            return check_floor(Floor.from_stored(self.store.tensors("floor", key, make)[0]), self.reference(), profile)

        return self.stages.once(f"floor.{profile}", get, f"noise floor in {profile}", shown=True)

    def ceiling(self) -> FaultEffects | None:
        """Return what faults do to the original model, stored by model, inputs and faults; None as with `floor`."""
        made = self.model()
        if self.case.tolerance == "table" or not hasattr(made, "faulty_runs"):
            return None
        if self.case.artifacts.reference is not None:
            stored = part(self._recorded(), "ceiling")
            with naming(self.case.artifacts.reference):
                return FaultEffects.from_stored(stored) if stored else None

        def make() -> Tensors:
            exact, sample = self.exact(), self.sample()
            return measure_fault_effects(self.case.model, made, exact, sample.reference, sample.inputs).stored()

        key = {**self._measured_key(), "faults": faults_key(), "measures": measures_key()}
        return self.stages.once(
            "faults",
            lambda: FaultEffects.from_stored(self.store.tensors("ceiling", key, make)[0]),
            "faults tried",
            shown=True,
        )

    def artifact(self, kind: Kind, sdk: Sdk | None) -> Artifact:
        """Return the artifact that a runtime of this kind opens."""
        if kind == "module":
            return self.module()
        return self.onnx() if kind == "onnx" else self.qpc(sdk)

    def module(self) -> Artifact:
        """Return the torch module, in memory."""
        digest = fingerprint(self._body_key())
        return Artifact("module", None, digest, self._body_key(), (self.loaded()[0], self.model().graph))

    def loaded(self) -> tuple[Any, Tensors]:
        """Return the torch module that is exported, and example inputs."""
        return self.stages.once("module", lambda: self.model().module(), "module", shown=True)

    def onnx(self) -> Artifact:
        """Return the exported ONNX file, stored by model, exporter and code."""
        from qeff_validate.builders.export_onnx import export_key, export_onnx

        given = self.case.artifacts.onnx
        if given is not None:
            return replace(self._adopted("onnx", given), buckets=self.model().graph.buckets)

        def make(folder: Path) -> None:
            module, examples = self.loaded()
            export_onnx(module, examples, self.model().graph, folder, self.case.exporter, self._body_key())

        key = {"model": self._body_key(), "export": export_key(self.case.exporter), "code": code_key()}
        entry = self.stages.once(
            "export", lambda: self.store.entry("onnx", key, make, waiting=self._waiting), "export", shown=True
        )
        self.seconds["export"] = entry.seconds
        if self.stages.drop("module"):
            release_memory()  # a Hugging Face module holds cycles; its weights would stand beside ONNX Runtime's
        buckets = self.model().graph.buckets
        return Artifact("onnx", entry.path / "model.onnx", entry.digest, entry.provenance, buckets=buckets)

    def _adopted(self, kind: Kind, path: str | Path) -> Artifact:
        return self.stages.once(kind, lambda: user_artifact(self.case, kind, Path(path)))

    def qpc(self, sdk: Sdk | None) -> Artifact:
        """Return the compiled QPC, stored by ONNX content, compile options and SDK."""
        from qeff_validate.builders.compile_qpc import compile_key, compile_qpc

        given = self.case.artifacts.qpc
        if given is not None:
            return self._adopted("qpc", given)
        if sdk is None:
            raise ConfigError("a runtime that opens QPCs needs capabilities with an sdk, whose compiler makes them")
        source, case = self.onnx(), self.case
        buckets = self.model().graph.buckets

        def make(folder: Path) -> None:
            assert source.path is not None
            compile_qpc(
                source.path,
                folder,
                sdk=sdk,
                options=case.compile,
                precision=case.precision,
                buckets=buckets,
                on_line=self.progress.line,
            )

        key = {
            "onnx": source.digest,
            "compile": compile_key(case.compile, case.precision, buckets, sdk),
            "code": code_key(),
        }
        label = "compile" if not sdk.built_in else "compile (simulated)"
        entry = self.stages.once(
            label, lambda: self.store.entry("qpc", key, make, waiting=self._waiting), label, shown=True
        )
        self.seconds["compile"] = entry.seconds
        return Artifact("qpc", entry.path / "qpc", entry.digest, entry.provenance)

    def _waiting(self) -> None:
        self.progress.line("another process is building the same artifact; waiting for it")
