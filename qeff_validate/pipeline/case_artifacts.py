# SPDX-License-Identifier: Apache-2.0
"""What the runtimes of one case share: model, inputs, reference, noise floor, effects of faults, and artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from qeff_validate.errors import ConfigError
from qeff_validate.memory import release_memory
from qeff_validate.models.framework_calls import import_frameworks, versions
from qeff_validate.mutation.power import FaultEffects, faults_key, measure_fault_effects
from qeff_validate.pipeline.measure_floor import Sample, measure_floor
from qeff_validate.pipeline.recorded_file import naming, outputs_of, part, read_recorded
from qeff_validate.pipeline.stages import Progress, Stages
from qeff_validate.pipeline.user_artifacts import user_artifact
from qeff_validate.prechecks.graph_precision import GraphPrecision, graph_precision
from qeff_validate.protocols import (
    FaultTested,
    FileAdapted,
    Graph,
    Measured,
    Model,
    RecordingChecked,
    Runtime,
    Session,
    Sharing,
    capabilities,
    model_kind,
)
from qeff_validate.runtimes.renamed_session import RenamedSession
from qeff_validate.sdk.locate import Sdk
from qeff_validate.tensors import Tensors


class CaseArtifacts:
    """Stages of one case that do not depend on a runtime; each happens once, and what failed stays failed.

    Args:
        case: the case.
        options: its validated options.
        store: holds what is built and measured.
        progress: told of long stages.
        model: a model in memory instead of the case's source.
        tokenizer: the tokenizer of ``model``.
        wrapper: a model wrapper instead of a new one.
    """

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
        self._in_memory, self._tokenizer, self._wrapper = model, tokenizer, wrapper
        self.stages = Stages(case.name, progress)
        self.seconds: dict[str, float] = {}
        self.adaptations: Sequence[str] = ()
        """What was done on the host so that the user's file that was opened last fits the interface."""

    @property
    def in_memory(self) -> bool:
        """True for a model that was given, not read from the case's source."""
        return self._in_memory is not None or self._wrapper is not None

    def model(self) -> Model:
        """Return the model wrapper."""
        if self._wrapper is not None:
            return self._wrapper
        create = model_kind(self.case).create

        def make() -> Model:
            wrapper = create(self.case, self.options, self._in_memory, self._tokenizer)
            if isinstance(wrapper, Sharing):
                wrapper.share = self._shared
            return wrapper

        return self.stages.once("model", make)

    def _shared(self, name: str, inputs: Any, run: Callable[[], Tensors]) -> Tensors:
        """Return hidden states of a body, stored by body and token ids: cases with other poolings read them too."""
        ids = {"ids": digest_of({str(row): tokens for row, tokens in enumerate(inputs.ids)}), "pad": inputs.pad}
        provenance = {"body": self.body_key()["body"], **versions("torch"), "code": code_key()}
        key = {"name": name, **ids, **provenance, "faults": faults_key() if name.startswith("faults") else None}
        return self.store.tensors("states", key, run)[0]

    def inputs(self) -> Any:
        """Return the model's inputs: recorded ones, else stored by texts and tokenizer."""
        recorded = self.recorded()
        if "ids" in recorded:

            def read() -> Any:
                with naming(self.case.artifacts.reference):
                    return self.model().inputs(recorded)

            return self.stages.once("inputs", read)
        return self.stages.once("inputs", lambda: self.model().inputs(self.stored_inputs()[0]))

    def graph(self) -> Graph:
        """Return the interface of the exported graph."""
        return self.stages.once("graph", lambda: self.model().interface(self.inputs()))

    def recorded(self) -> Tensors:
        """Return the tensors of ``artifacts: {reference: …}``; none if the case names no such file."""
        path = self.case.artifacts.reference
        return {} if path is None else self.stages.once("recorded", lambda: read_recorded(Path(path)))

    def stored_inputs(self) -> tuple[Tensors, Entry]:
        """Return the inputs in their stored form, and the entry of the store that holds them."""
        model = self.model()

        def get() -> tuple[Tensors, Entry]:
            key = {**model.inputs_key(), "code": code_key()}
            return self.store.tensors("inputs", key, model.tokenize, waiting=import_frameworks)

        return self.stages.once("tokenize", get)

    def _stored(self, kind: str, label: str, key: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """Return tensors of the store, made if they are not there; say so if they were."""
        tensors, entry = self.store.tensors(kind, key, make, waiting=import_frameworks)
        if entry.made:
            release_memory()
        self._tell(label, entry)
        return tensors

    def _reference_key(self, dtype: str) -> dict[str, Any]:
        return {"model": self.body_key(), "inputs": self.stored_inputs()[1].digest, "dtype": dtype, "code": code_key()}

    def body_key(self) -> Mapping[str, Any]:
        """Return the model's fingerprint, with the versions of the frameworks."""
        return self.stages.once("fingerprint", lambda: {**self.model().fingerprint(), **versions("torch")})

    def reference(self) -> Tensors:
        """Return the float32 outputs of the Hugging Face model, stored by model and inputs."""

        def make() -> Tensors:
            return self.model().reference(self.inputs(), dtype="float32")

        if self.case.artifacts.reference is not None:
            return self.stages.once("reference.recorded", self._recorded_outputs, "recorded reference")
        return self.stages.once(
            "reference",
            lambda: self._stored("reference", "reference", self._reference_key("float32"), make),
            "reference",
            shown=True,
        )

    def _recorded_outputs(self) -> Tensors:
        outputs, model = outputs_of(self.recorded()), self.model()
        if isinstance(model, RecordingChecked):
            with naming(self.case.artifacts.reference):
                model.check_recorded(outputs, self.inputs())
        return outputs

    def exact(self) -> Tensors:
        """Return the float64 outputs of the Hugging Face model for the rows that are measured, stored."""

        def make() -> Tensors:
            return self.model().reference(self.sample().inputs, dtype="float64")

        def get() -> Tensors:
            return self._stored("reference", "reference in float64", self._measured_key(), make)

        return self.stages.once("reference.float64", get, "reference in float64", shown=True)

    def sample(self) -> Sample:
        """Return the rows that floor and faults are measured on: all of them, if they are few."""
        model = self.model()

        def choose() -> Sample:
            inputs, reference = self.inputs(), self.reference()
            if not isinstance(model, Measured):
                return Sample(inputs, reference, None, DecisiveRows(()))
            lengths = [tokens.size for tokens in inputs.ids]
            few = len(lengths) <= MOST
            choice = decisive_rows(lengths, () if few else model.sensitivity(inputs, reference), self.case.seed)
            if not choice.left_out:
                return Sample(inputs, reference, None, choice)
            subset, outputs, rows = model.subset(inputs, reference, choice.rows)
            return Sample(subset, outputs, rows, choice)

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
        profile, model = precision.profile, self.model()
        if self.case.tolerance == "table":
            return None
        if self.case.artifacts.reference is not None:
            stored, reference = part(self.recorded(), profile), self.reference()
            with naming(self.case.artifacts.reference):
                return check_floor(Floor.from_stored(stored), reference, profile) if stored else None
        if not isinstance(model, Measured):
            return None

        def make() -> Tensors:
            return measure_floor(model, self.exact(), self.sample(), precision, digest_of(self.reference())).stored()

        key = {**self._measured_key(), "precision": precision.model_dump(mode="json"), "measures": measures_key()}

        def get() -> Floor:
            stored = self._stored("floor", f"noise floor in {profile}", key, make)
            return check_floor(Floor.from_stored(stored), self.reference(), profile)

        return self.stages.once(f"floor.{profile}", get, f"noise floor in {profile}", shown=True)

    def ceiling(self) -> FaultEffects | None:
        """Return what faults do to the original model, stored by model, inputs and faults; None as with `floor`."""
        model = self.model()
        if self.case.tolerance == "table" or not isinstance(model, FaultTested):
            return None
        if self.case.artifacts.reference is not None:
            stored = part(self.recorded(), "ceiling")
            with naming(self.case.artifacts.reference):
                return FaultEffects.from_stored(stored) if stored else None

        def make() -> Tensors:
            exact, sample = self.exact(), self.sample()
            return measure_fault_effects(self.case.model, model, exact, sample.reference, sample.inputs).stored()

        key = {**self._measured_key(), "faults": faults_key(), "measures": measures_key()}
        return self.stages.once(
            "faults",
            lambda: FaultEffects.from_stored(self._stored("ceiling", "faults tried", key, make)),
            "faults tried",
            shown=True,
        )

    @contextmanager
    def session(self, runtime: Runtime) -> Iterator[Session]:
        """Open what a runtime runs for the case."""
        artifact = self.artifact(runtime.kind, capabilities(runtime).sdk)
        with self.opened(runtime, artifact) as session:
            yield session

    @contextmanager
    def opened(self, runtime: Runtime, artifact: Artifact) -> Iterator[Session]:
        """Open an artifact; a user's own stands behind our names."""
        with runtime.open(artifact) as session:
            user_artifacts, model = self.case.artifacts, self.model()
            if not (user_artifacts.onnx or user_artifacts.qpc):
                yield session
                return
            completed = session
            if isinstance(model, FileAdapted):
                completed, self.adaptations = model.adapt(session, user_artifacts)
            yield RenamedSession(completed, self.graph(), user_artifacts)

    def file_precision(self, kind: Kind) -> GraphPrecision:
        """Return what the user's ONNX file computes in; float32 where there is none."""
        user_artifacts = self.case.artifacts
        if kind == "module" or user_artifacts.onnx is None or (kind == "qpc" and user_artifacts.qpc is not None):
            return GraphPrecision()
        path = Path(user_artifacts.onnx)
        self._adopted("onnx", path)  # a bomb of functions, a pipe or a device is refused before anything opens it
        return self.stages.once("file.precision", lambda: graph_precision(path), "precision of the file")

    def is_foreign(self, kind: Kind) -> bool:
        """Return whether a runtime of this kind opens a file of the user's that this library has not exported."""
        user_artifacts = self.case.artifacts
        if kind == "qpc" and user_artifacts.qpc:
            path = Path(user_artifacts.qpc)
            return self.stages.once(
                "qpc.origin", lambda: read_provenance("qpc", path).model is None, "origin of the QPC"
            )
        if kind == "module" or not user_artifacts.onnx:
            return False
        path = Path(user_artifacts.onnx)
        return self.stages.once(
            "file.origin", lambda: read_provenance("onnx", path).model is None, "origin of the file"
        )

    def artifact(self, kind: Kind, sdk: Sdk | None) -> Artifact:
        """Return the artifact that a runtime of this kind opens."""
        if kind == "module":
            return self.module()
        return self.onnx() if kind == "onnx" else self.qpc(sdk)

    def module(self) -> Artifact:
        """Return the torch module, in memory."""
        digest = fingerprint(self.body_key())
        return Artifact("module", None, digest, self.body_key(), (self.loaded()[0], self.graph()))

    def loaded(self) -> tuple[Any, Tensors]:
        """Return the torch module that is exported, and example inputs."""
        return self.stages.once("module", lambda: self.model().module(), "module", shown=True)

    def onnx(self) -> Artifact:
        """Return the exported ONNX file, stored by model, exporter and code."""
        from qeff_validate.builders.export_onnx import export_key, export_onnx

        user_file = self.case.artifacts.onnx
        if user_file is not None:
            return replace(self._adopted("onnx", user_file), buckets=self.graph().buckets)

        def make(folder: Path) -> None:
            module, examples = self.loaded()
            export_onnx(module, examples, self.graph(), folder, self.case.exporter, self.body_key())

        key = {"model": self.body_key(), "export": export_key(self.case.exporter), "code": code_key()}
        entry = self.stages.once(
            "export",
            lambda: self._tell("export", self.store.entry("onnx", key, make, waiting=self._waiting)),
            "export",
            shown=True,
        )
        self.seconds["export"] = entry.seconds
        if self.stages.drop("module"):
            release_memory()  # a Hugging Face module holds cycles; its weights would stand beside ONNX Runtime's
        buckets = self.graph().buckets
        return Artifact("onnx", entry.path / "model.onnx", entry.digest, entry.provenance, buckets=buckets)

    def _adopted(self, kind: Kind, path: str | Path) -> Artifact:
        return self.stages.once(kind, lambda: user_artifact(self.case, kind, Path(path)))

    def qpc(self, sdk: Sdk | None) -> Artifact:
        """Return the compiled QPC, stored by ONNX content, compile options and SDK."""
        from qeff_validate.builders.compile_qpc import compile_key, compile_qpc

        user_file = self.case.artifacts.qpc
        if user_file is not None:
            return self._adopted("qpc", user_file)
        if sdk is None:
            raise ConfigError("a runtime that opens QPCs needs capabilities with an sdk, whose compiler makes them")
        source, case = self.onnx(), self.case
        buckets = self.graph().buckets

        def make(folder: Path) -> None:
            assert source.path is not None
            compile_qpc(
                source.path,
                folder,
                sdk=sdk,
                options=case.compile,
                precision=case.precision,
                buckets=buckets,
                inputs=self._file_inputs(),
                on_line=self.progress.line,
            )

        key = {
            "onnx": source.digest,
            "compile": compile_key(case.compile, case.precision, buckets, sdk),
            "code": code_key(),
        }
        label = "compile" if not sdk.built_in else "compile (simulated)"
        entry = self.stages.once(
            label,
            lambda: self._tell(label, self.store.entry("qpc", key, make, waiting=self._waiting)),
            label,
            shown=True,
        )
        self.seconds["compile"] = entry.seconds
        return Artifact("qpc", entry.path / "qpc", entry.digest, entry.provenance)

    def _file_inputs(self) -> Mapping[str, Sequence[int | str]]:
        """Return the interface's dims of each input by its name in the user's ONNX file; empty without a file."""
        artifacts = self.case.artifacts
        if artifacts.onnx is None:
            return {}
        return {artifacts.inputs.get(spec.name, spec.name): spec.shape for spec in self.graph().inputs}

    def _tell(self, label: str, entry: Entry) -> Entry:
        """Say that an entry of the store is used again."""
        if not entry.made:
            self.progress.line(f"{self.case.name}: {label}: from the store, made in {entry.seconds:.1f} s")
        return entry

    def _waiting(self) -> None:
        self.progress.line("another process is building the same artifact; waiting for it")
