# SPDX-License-Identifier: Apache-2.0
"""The contracts between the parts: what a session, a runtime and a model kind are.

Protocols, so that a plug-in needs no base class of ours. Keep this page short: a convenience is a function
elsewhere, and a method that is added here must be written by everybody who ever made a runtime or a model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.comparison.metric import VECTOR_METRICS, MetricSpec
from qeff_validate.errors import ConfigError
from qeff_validate.registry import load_entry
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec

if TYPE_CHECKING:
    from pydantic import BaseModel

    from qeff_validate.comparison.noise_floor import Floor
    from qeff_validate.comparison.task_metrics import TaskScore
    from qeff_validate.comparison.verdict import Verdict
    from qeff_validate.config.case import Case, Precision


class Session(Protocol):
    """An open handle on an artifact."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: tuple[Shapes, ...]
    """The allowed combinations (specializations); empty: any."""

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once: exact names, dtypes and shapes or RunError; results are copies.

        Args:
            feeds: every input.
            fetch: the outputs to return; all if None.
        """

    def reset(self) -> None:
        """Forget retained state."""


class Runtime(Protocol):
    """An adapter that opens one kind of artifact; it may have ``capabilities`` besides (`Capabilities`)."""

    name: str
    kind: Kind

    def probe(self) -> str | None:
        """Return None if usable here, else why not and what to do."""

    def open(self, artifact: Artifact) -> AbstractContextManager[Session]:
        """Open an artifact of this kind; whatever is held is released when the context ends."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a runtime says of itself in its attribute ``capabilities``; these defaults hold for one without it.

    Attributes:
        compute: the precision that it computes in, ``fp32`` or ``fp16``; None: the one that the case asks for, as a
            program that is compiled for the case does. It decides the bounds.
        simulated: it stands in for hardware, and every result says so.
        sdk: the SDK (`sdk.locate.Sdk`) whose compiler makes the QPCs that it opens; None: it opens none.
    """

    compute: Literal["fp32", "fp16"] | None = "fp32"
    simulated: bool = False
    sdk: Any = None


def capabilities(runtime: Runtime) -> Capabilities:
    """Return what a runtime says of itself, or the defaults."""
    stated: Capabilities = getattr(runtime, "capabilities", Capabilities())
    return stated


LONGEST_RUN_S = 10_000_000
"""A limit of four months for one run; the system's clocks take no infinite one."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How runtimes are to be set up.

    Attributes:
        sdk: prefix of the installed AI 100 SDK; None: ``QEFF_VALIDATE_SDK``, else ``/opt/qti-aic``.
        device_ids: the cards to use; empty: the first free one.
        threads: intra-op threads on the host; None: the library's own choice.
        ort_optimization: optimization level of ONNX Runtime: ``disabled``, ``basic``, ``extended`` or ``all``; None:
            ``QEFF_VALIDATE_ORT_OPTIMIZATION``, else ``all``.
        packed_weights: whether ONNX Runtime copies weights into memory in the layout of its kernels, which is faster;
            else it reads them from their mapped file. None: unless they have more than 1 GiB.
        run_timeout_s: after which time without an answer a runtime that runs in a process of its own is killed.

    Examples:
        >>> Settings(device_ids=(0, 1)).device_ids
        (0, 1)
        >>> Settings(run_timeout_s=-1)
        Traceback (most recent call last):
        qeff_validate.errors.ConfigError: the time limit of a run is -1 s: give 0.001 to 10,000,000 seconds
    """

    sdk: str | None = None
    device_ids: tuple[int, ...] = ()
    threads: int | None = None
    ort_optimization: str | None = None
    packed_weights: bool | None = None
    run_timeout_s: float = 600

    def __post_init__(self) -> None:
        if not 0 < self.run_timeout_s <= LONGEST_RUN_S:
            raise ConfigError(
                f"the time limit of a run is {self.run_timeout_s} s: give 0.001 to {LONGEST_RUN_S:,} seconds"
            )

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Settings:
        """Return the settings that `dataclasses.asdict` has made plain and JSON has carried to another process."""
        return cls(**{**plain, "device_ids": tuple(plain["device_ids"])})


@dataclass(frozen=True, slots=True)
class Graph:
    """The interface of an exported graph.

    Attributes:
        inputs: specs with symbolic dims.
        outputs: specs with symbolic dims.
        buckets: the values of the symbols for which it is compiled, one mapping for each specialization.
        why: by the name of an output, why a graph of somebody else's is not judged without it.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    buckets: tuple[Mapping[str, int], ...]
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ComparisonContext:
    """What a comparison needs to know beside the outputs.

    Attributes:
        precision: profile of what computed them: ``fp32``, ``fp16``, ``fp16+mxfp6``, ….
        override: the case's own bounds for this runtime, with ``why``.
        seed: draws rows for metrics of pairs.
        floor: errors of legitimate runs of the original model in this precision; None: they were not measured.
        device: the outputs are a device's, so systematic errors are looked for as well.
        ours: the graph is this library's export, so rows without a token must be zeros; in graphs of others they may
            hold anything.
        reached: rows that change with the content of a token-less row in their batch (`Filled`).
        padded: rows that were fed with padding.
    """

    precision: str
    override: Mapping[str, Any]
    seed: int
    floor: Floor | None = None
    device: bool = False
    ours: bool = True
    reached: Sequence[int] = ()
    padded: Collection[int] = ()


class Inputs(Protocol):
    """Model inputs that are ready for every runtime."""

    @property
    def labels(self) -> Sequence[str]:
        """One text for each row, for messages."""

    @property
    def tokenless(self) -> frozenset[int]:
        """Rows that hold no token; tested structurally."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the report should know of them."""


class Change(Protocol):
    """A fault to try on an original model (`mutation.mutant.Mutant`)."""

    @property
    def name(self) -> str:
        """What is wrong."""

    @property
    def level(self) -> str:
        """What is changed: ``body``, ``pooling``, ``adapters`` or ``session``."""

    @property
    def change(self) -> Callable[..., Any]:
        """What is done at this level."""

    def applied_to(self, model: Any) -> AbstractContextManager[None]:
        """Apply a fault of level ``body`` to a model for the duration of the context; at other levels do nothing.

        Raises:
            IncomparableError: the model has nothing that could be changed.
        """


Share: TypeAlias = "Callable[[str, Any, Callable[[], Tensors]], Tensors]"
"""Called with the name of a computation, its inputs and the computation: returns its stored result if there is one."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to time on a session: plain feeds, so that timing needs to know no model kind.

    Attributes:
        name: says what it is, such as ``seq_len 32, batch 4``; baseline and candidate are paired by it.
        quantity: what its duration is: one of the kind's `ModelKind.quantities`.
        feeds: the runs of one shot, in order; the same content gives the same work, however often it is run.
        before: runs that set retained state, once after a reset and untimed.
        fetch: outputs to return; None: all.
        count: how many durations of this quantity a shot holds; its seconds are divided by it.
        rows: rows that one duration processes; 0: none are.
        tokens: tokens that one duration produces; 0: none are produced.
    """

    name: str
    quantity: str
    feeds: tuple[Tensors, ...]
    before: tuple[Tensors, ...] = ()
    fetch: tuple[str, ...] | None = None
    count: int = 1
    rows: int = 1
    tokens: int = 0


class Model(Protocol):
    """A wrapper round a Hugging Face model. No method but those that say so loads a framework."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Return plain data that changes with everything a graph depends on: weights, config, options."""

    def inputs_key(self) -> Mapping[str, Any]:
        """Return plain data that changes with everything the inputs depend on: texts, tokenizer, options."""

    def tokenize(self) -> Tensors:
        """Make the inputs in a form that can be stored; loads the tokenizer."""

    def inputs(self, stored: Tensors) -> Inputs:
        """Return the inputs from their stored form."""

    def interface(self, inputs: Any) -> Graph:
        """Return the interface of the exported graph for inputs from `inputs`."""

    def module(self) -> tuple[Any, Tensors]:
        """Load the torch module to export, in eval mode, and example inputs."""

    def reference(self, inputs: Any, *, dtype: str) -> Tensors:
        """Run the original model, each row by itself; ``dtype`` is ``float32`` or ``float64``."""

    def infer(self, session: Session, inputs: Any, reference: Tensors) -> Tensors:
        """Run a session on all rows and return outputs in the order of the rows.

        Args:
            session: open.
            inputs: from `inputs`.
            reference: from `reference`; a language model is fed its tokens, so that each step is compared in the same
                context. Nothing else of it may be used.
        """

    def judge(self, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare what a runtime gave with the reference."""

    def relate(self, name: str, session: Session, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare two ways of running the same inputs on one session; no reference is needed.

        Raises:
            IncomparableError: the relation does not apply here; the text says why.
        """


@runtime_checkable
class Measured(Protocol):
    """Optional part of a `Model`: bounds come from a measured noise floor instead of a table."""

    @abstractmethod
    def ensemble(self, inputs: Any, reference: Tensors, precision: Precision) -> Iterator[Tensors]:
        """Run the original model in a precision, in several legitimate ways; outputs as those of `Model.infer`.

        Shares no code with an exporter, a compiler or a simulator. Of the reference, a language model uses the tokens.
        """

    @abstractmethod
    def measure(self, exact: Tensors, outputs: Tensors, inputs: Any) -> Mapping[str, float]:
        """Return the worst value of each metric that gets a measured bound; ``exact`` is the float64 reference."""

    @abstractmethod
    def systematic_errors(self, center: Tensors, outputs: Tensors, inputs: Any) -> Mapping[str, float]:
        """Return the systematic parts of outputs' errors against what the precision gives on average."""

    @abstractmethod
    def sensitivity(self, inputs: Any, reference: Tensors) -> Sequence[float]:
        """Return how much rounding is expected to move each text, as far as the reference tells; the order counts."""

    @abstractmethod
    def subset(self, inputs: Any, reference: Tensors, texts: Sequence[int]) -> tuple[Any, Tensors, NDArray[np.int64]]:
        """Return inputs and reference of some texts alone, and the indices of their rows in an output, int64."""


@runtime_checkable
class FaultTested(Measured, Protocol):
    """Optional part of a `Model`: faults are tried on the original model, so that a verdict knows its power."""

    @abstractmethod
    def faulty_runs(
        self, inputs: Any, reference: Tensors, changes: Iterable[Change], dtype: str = "float32"
    ) -> Iterator[tuple[str, Tensors]]:
        """Run the original model with each of some faults; those that do not apply are left out."""


@runtime_checkable
class Prechecked(Protocol):
    """Optional part of a `Model`: a difference in feeds or provenance is found before outputs are compared.

    Its inputs then have ``ids``, ``texts``, ``pad`` and ``tables`` as those of ``embedding``.
    """

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return `Model.fingerprint` without ``body``: options that shape the graph; ``head``, ``adapters`` if any."""

    @abstractmethod
    def asked(self) -> Mapping[str, Any]:
        """Return what is to be tokenized (``texts``, ``prompt``) and the length limits; plain data."""

    @abstractmethod
    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return plain data that changes with the tokenizer."""

    @abstractmethod
    def rows(self) -> Any:
        """Return ``ids``, ``texts`` and ``pad`` as the tokenizer makes them now; loads no model."""

    @abstractmethod
    def reach(self, inputs: Any) -> int:
        """Return how many positions the graph must have."""

    @abstractmethod
    def published(self) -> Mapping[str, Any]:
        """Return what files beside the weights say that the case decides: pooling, normalize, max_seq_length."""


@runtime_checkable
class FillerChecked(Protocol):
    """Optional part of a `Model` whose batches may hold rows without a token."""

    @abstractmethod
    def reached(self, session: Session, inputs: Any, actual: Tensors) -> tuple[Sequence[int], Sequence[str]]:
        """Run batches with a token-less row once more with a real row in its place.

        Returns:
            The rows that only the token-less row changes, and findings.
        """


@runtime_checkable
class FileAdapted(Protocol):
    """Optional part of a `Model`: a user's file that gives or takes something else is completed on the host."""

    @abstractmethod
    def adapt(self, session: Session, artifacts: Any) -> tuple[Session, Sequence[str]]:
        """Return a session that fits the interface, under the names of the file, and findings that say what was done.

        Args:
            session: on the user's file.
            artifacts: the case's `config.case.Artifacts`, with the mapping of names.
        """


@runtime_checkable
class TaskScored(Protocol):
    """Optional part of a `Model`: what outputs are worth for a task is shown beside their verdict."""

    @abstractmethod
    def task_score(self, reference: Tensors, actual: Tensors, inputs: Any) -> TaskScore | None:
        """Return what the reference and a runtime's outputs, of the same shapes, reach on the case's task data.

        Returns:
            None: the inputs are no task data.
        """


@runtime_checkable
class RecordingChecked(Protocol):
    """Optional part of a `Model`: recorded reference outputs are checked against the inputs before they are used."""

    @abstractmethod
    def check_recorded(self, reference: Tensors, inputs: Any) -> None:
        """Refuse recorded outputs that do not fit the inputs.

        Raises:
            IncomparableError: a tensor is missing, of another dtype, or does not fit the others.
        """


@runtime_checkable
class Timed(Protocol):
    """Optional part of a `Model`: its speed can be measured and judged."""

    @abstractmethod
    def workloads(self, session: Session, inputs: Any) -> Sequence[Workload]:
        """Return what to time on an open session; feeds have the names of `Model.interface`."""


@runtime_checkable
class Sharing(Protocol):
    """Optional part of a `Model` that has results in common with other cases, such as hidden states of one body."""

    share: Share
    """Set by the pipeline before the first run."""


@dataclass(frozen=True, slots=True)
class OriginalRun:
    """One run of the original model on what one run of the graph is fed.

    Attributes:
        module: the torch module that is run; its submodules give their paths to an explanation.
        feeds: of the graph, by the names of `Model.interface`, with a row for each text and empty state.
        tokens: which places of ``input_ids`` hold a token, bool ``[batch, seq_len]``.
        run: runs ``module``, in its present dtype, and returns the graph's outputs as far as the original has them.
        owners: path of the module that an output belongs to, or a word for what is no module, such as ``pooling``.
        candidates: for outputs that are no module's, what other computations of the same inputs would give, by name;
            called after ``run``.
        steps: tokens at the end that a decode loop feeds one by one.
    """

    module: Any
    feeds: Tensors
    tokens: Array
    run: Callable[[], Tensors]
    owners: Mapping[str, str]
    candidates: Callable[[], Mapping[str, Tensors]] = dict
    steps: int = 0


@runtime_checkable
class Explained(Protocol):
    """Optional part of a `Model`: a failure can be traced to a module of the original model."""

    @abstractmethod
    def original_run(self, inputs: Any, reference: Tensors, sizes: Mapping[str, int], row: int) -> OriginalRun:
        """Return one run of a few texts, as `Measured.subset` gives them.

        Args:
            inputs: a few texts.
            reference: of these texts.
            sizes: values of the symbols of the interface that the graph fixes; others are free.
            row: index of the row of the reference that failed; a language model runs its prompt and continuation up to
                it, in one run.

        Raises:
            IncomparableError: the texts do not fit into one run of these sizes.
        """

    @abstractmethod
    def text_of_row(self, inputs: Any, reference: Tensors, row: int) -> int:
        """Return the index of the text, as `Measured.subset` takes it, that a row of an output belongs to."""


@dataclass(frozen=True, slots=True)
class ModelKind:
    """What an entry point in ``qeff_validate.models`` names: the options class, and how to get the wrapper.

    Attributes:
        options: pydantic class of the case's ``options``; importing it loads no framework.
        create: makes the wrapper from a case, validated options and an in-memory model or None.
        suite: the pytest mark of its cases.
        metrics: the metrics that its verdicts gate, which a case's tolerance may bound.
        relations: names for `Model.relate`.
        mutants: tables of `mutation.mutant.Mutant`, as ``package.module:NAME``.
        exporters: the exporters that can export it; the first is the default.
        stateful: its sessions keep state from run to run, as a decode loop does.
        quantities: what the durations of `Timed.workloads` are, such as ``latency``; a case may set budgets for these.
    """

    options: type[BaseModel]
    create: Callable[..., Model]
    suite: str
    metrics: tuple[MetricSpec, ...] = VECTOR_METRICS
    relations: tuple[str, ...] = ()
    mutants: tuple[str, ...] = ()
    exporters: tuple[str, ...] = ("dynamo", "torchscript")
    stateful: bool = False
    quantities: tuple[str, ...] = ()


def runtime(name: str, settings: Settings | None = None) -> Runtime:
    """Return the runtime adapter of this name.

    Raises:
        ConfigError: no such runtime.

    Examples:
        >>> runtime("ort").kind, runtime("sim").kind
        ('onnx', 'qpc')
        >>> runtime("otr")
        Traceback (most recent call last):
        qeff_validate.errors.ConfigError: no runtime is called 'otr'. Did you mean 'ort'?
    """
    create: Callable[[Settings], Runtime] = load_entry("runtimes", name)
    return create(settings or Settings())


def model_kind(case: Case) -> ModelKind:
    """Return the model kind of a case."""
    kind: ModelKind = load_entry("models", case.model)
    return kind
