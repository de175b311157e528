# SPDX-License-Identifier: Apache-2.0
"""The only place where the pieces meet: case → model → artifact → runtime → tensors → verdict → report."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.builders.store import Store
from qeff_validate.comparison.bounds import check_tolerance
from qeff_validate.comparison.metric import most_bounds
from qeff_validate.config.case import Artifacts, Case, Inputs
from qeff_validate.config.explain import explain as explain_config
from qeff_validate.config.loader import load_cases
from qeff_validate.config.yaml_reader import parse_yaml
from qeff_validate.errors import ConfigError, IncomparableError, ValidateError, suggest
from qeff_validate.files import temporary_folder
from qeff_validate.folders import check_writable
from qeff_validate.models.framework_calls import versions
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.explanation import LIMITS_S, ExplainMode, explained, with_explanation
from qeff_validate.pipeline.machine import KERNELS
from qeff_validate.pipeline.performance import (
    TimingBaseline,
    build_costs,
    check_performance,
    measure_case,
    stored_measurements,
)
from qeff_validate.pipeline.stages import NumberedProgress, Progress, Silent
from qeff_validate.pipeline.tuning import Tuning, audit, tune
from qeff_validate.protocols import Model, Prechecked, Runtime, Settings, capabilities, model_kind, runtime
from qeff_validate.registry import registered
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime
from qeff_validate.sdk.locate import Sdk, installed, simulated

if TYPE_CHECKING:
    from qeff_validate.explain.range_audit import RangeAudit
    from qeff_validate.selftest.run import Stage
    from qeff_validate.selftest.score import Score


def load(paths: Sequence[Path]) -> list[Case]:
    """Read config files and check each case's options, runtimes and tolerances. Loads no framework.

    Raises:
        ConfigError: with file, key, value and remedy.
    """
    cases = load_cases(paths)
    for case in cases:
        check(case)
    return cases


def case_for(source: str, *, kind: str = "embedding", options: Sequence[str] = ()) -> Case:
    """Return a case for a source without a config file.

    Args:
        source: as in a config, relative to the working directory.
        kind: model kind.
        options: ``KEY=VALUE`` of the model kind; values are read as YAML, so that ``seq_len=[32, 64]`` is a list.

    Raises:
        ConfigError: an option is no KEY=VALUE, or wrong.
    """
    values: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"option {text!r}: wanted KEY=VALUE, e.g. pooling=cls")
        values[key] = parse_yaml(value, f"option {key}")
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", source.rpartition(":")[2].rstrip("/").rpartition("/")[2]).strip("-._+")[
        :100
    ]
    try:
        case = Case(name=name or "model", model=kind, source=source, options=values)
    except ValidationError as exc:
        raise ConfigError(explain_config(exc, "--model")) from exc
    check(case)
    return case


def check(case: Case) -> Any:
    """Return a case's validated options; its runtimes and model kind must be known.

    Raises:
        ConfigError: an option, a runtime or the model kind is wrong.
    """
    tolerances = case.tolerance if isinstance(case.tolerance, dict) else {}
    timed = () if case.performance is None else case.performance.runtimes or ()
    for name in (*case.runtimes, *tolerances, *(item.runtime for item in case.expect), *timed):
        if name not in registered("runtimes"):
            raise ConfigError(
                f"case {case.name!r}: no runtime is called {name!r}.{suggest(name, registered('runtimes'))}"
            )
    kind = model_kind(case)
    for mark in case.marks:
        if mark in registered("runtimes"):  # `-m ai100` would select tests of other runtimes
            raise ConfigError(
                f"case {case.name!r}: marks: {mark!r} is the mark of the tests on that runtime: choose another name"
            )
    for name, bounds in tolerances.items():
        check_tolerance(f"case {case.name!r}: tolerance.{name}", bounds, most_bounds(kind.metrics))
    if case.exporter not in kind.exporters:
        raise ConfigError(
            f"case {case.name!r}: exporter {case.exporter} cannot export the model kind {case.model!r}: leave exporter"
            f" out, or say {' or '.join(kind.exporters)}"
        )
    try:
        return kind.options.model_validate(case.options)
    except ValidationError as exc:
        raise ConfigError(explain_config(exc, f"case {case.name!r}: options")) from exc


def validate(
    case: Case | Sequence[Case],
    runtimes: Sequence[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    store: Path | str | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    record: Path | None = None,
    fail_fast: bool = False,
    explain: ExplainMode = "off",
) -> Report:
    """Run cases on runtimes and compare every output with the Hugging Face reference.

    Args:
        case: one case or several.
        runtimes: instead of those that the cases name.
        model: an in-memory torch model instead of the case's source; it is left unchanged.
        tokenizer: the tokenizer of ``model``.
        store: directory of the artifact store; default: ``$QEFF_VALIDATE_HOME``, else the user's cache.
        settings: SDK prefix, cards, threads.
        progress: is told of each long step.
        record: directory for each case's inputs, reference outputs and floor, ``CASE.safetensors``.
        fail_fast: after the first result that fails, is inconclusive or an error, the others are ``not_run``.
        explain: whether results that fail get an explanation: ``off``, ``auto`` (within a minute each) or ``full``.

    Returns:
        A report with one result for each case and runtime. A mismatch is a result, and so is an error; a recording that
        fails after all is in ``Report.unwritten``.

    Raises:
        ConfigError: a case or runtime name is wrong, or ``record`` cannot be written to; before anything is run.

    Examples:
        >>> case = Case(name="small", source="random:bert", options={"pooling": "mean"}, tolerance="table")
        >>> report = validate(case, runtimes=["torch"])
        >>> report.passed, report.results[0].compared
        (True, 33)
    """
    cases = [case] if isinstance(case, Case) else list(case)
    planned = [(item, name) for item in cases for name in runtimes or item.runtimes]
    numbered = NumberedProgress(progress or Silent(), len(planned))
    runner = Runner(store=store, settings=settings, progress=numbered, model=model, tokenizer=tokenizer)
    for item, name in planned:
        check(item)
        runner.runtime(name)
    installed(runner.settings.sdk)  # the report asks it in the end
    if record is not None:
        check_writable(record, "--record")
    results: list[Result] = []
    recorded: set[str] = set()
    unwritten: list[str] = []
    stopped = ""
    for numbered.number, (item, name) in enumerate(planned, start=1):
        if stopped:
            results.append(Result(item.name, name, "not_run", f"{stopped} did not pass, and --fail-fast is on"))
            continue
        results.append(runner.result(item, name, explain))
        if fail_fast and results[-1].expected is None and results[-1].status in ("fail", "inconclusive", "error"):
            stopped = f"{item.name}-{name}"
        if record is not None and results[-1].planned and item.name not in recorded:
            recorded.add(item.name)
            try:
                runner.pipeline(item).record(record)
            except Exception as exc:  # whatever happens to a file, verdicts are kept
                kind = "" if isinstance(exc, ValidateError) else f"unexpected {type(exc).__name__}: "
                unwritten.append(f"{item.name}: not recorded: {kind}{exc}")
    return Report(tuple(results), environment(runner.settings), tuple(unwritten))


def perf(
    cases: Sequence[Case],
    runtimes: Sequence[str] | None = None,
    *,
    against: Path | None = None,
    store: Path | str | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Time cases on runtimes, and judge them against their budgets and a baseline.

    Args:
        cases: what to time.
        runtimes: instead of those that the cases name.
        against: a config or a bundle, whose cases of the same names are run beside these; or a report or a baseline
            with timings. None: only budgets are judged.
        store: directory of the artifact store.
        settings: SDK prefix, cards, threads.
        progress: is told of each long step.

    Returns:
        A report with one result for each case and runtime. What was only measured is ``not_run``, with the reason.

    Raises:
        ConfigError: a case, a budget or the baseline is wrong, or a budget is on a simulated runtime that does not
            accept it; before anything is built.
    """
    runner = Runner(store=store, settings=settings, progress=progress)
    baselines = _baselines(against) if against is not None else None
    planned = []
    for case in cases:
        check(case)
        for name in runtimes or case.runtimes:
            baseline = None if baselines is None else baselines(case.name, name)
            check_performance(case, runner.runtime(name), against=baseline is not None)
            planned.append((case, name, baseline))
    results = [runner.timed(case, name, baseline) for case, name, baseline in planned]
    return Report(tuple(results), environment(runner.settings))


def _baselines(path: Path) -> Callable[[str, str], TimingBaseline]:
    """Return a function from case and runtime to what a file or folder has of it."""
    from qeff_validate.builders.bundle import MANIFEST, read_bundle
    from qeff_validate.report.baseline import read_entries

    if path.suffix in (".yaml", ".yml") or (path / MANIFEST).is_file():
        cases = {case.name: case for case in (load([path]) if path.is_file() else read_bundle(path))}

        def live(case: str, name: str) -> TimingBaseline:  # noqa: ARG001
            if case not in cases:
                raise ConfigError(f"--against: {path} has no case {case!r}.{suggest(case, cases)}")
            return TimingBaseline(str(path), case=cases[case])

        return live
    try:
        stored = stored_measurements(read_entries(path))
    except IncomparableError as exc:
        raise ConfigError(f"--against: {path}: {exc}") from exc

    def kept(case: str, name: str) -> TimingBaseline:
        if (case, name) not in stored:
            known = ", ".join(f"{case}-{name}" for case, name in stored) or "none at all"
            raise ConfigError(f"--against: {path} has no timings of {case}-{name}; it has {known}")
        return TimingBaseline(str(path), stored=stored[case, name])

    return kept


def bundle(
    cases: Sequence[Case],
    folder: Path,
    name: str,
    *,
    store: Path | str | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> str:
    """Build the QPCs of cases for a runtime, with recorded references, into one folder for another host.

    Args:
        cases: what to build.
        folder: where; must not exist yet.
        name: the runtime, ``ai100`` or ``sim``; its SDK's compiler is used, no card is.
        store: directory of the artifact store.
        settings: SDK prefix.
        progress: is told of each long step.

    Returns:
        The bundle's digest (hex SHA-256), which `builders.bundle.read_bundle` can be asked to expect.

    Raises:
        ConfigError: the runtime opens no QPC, the folder exists or cannot be written, or a case is wrong.
        ValidateError: a build failed; nothing is left.
    """
    from qeff_validate.builders.bundle import check_new, write_bundle

    runner = Runner(store=store, settings=settings, progress=progress)
    qpc_runtime = runner.runtime(name)
    if qpc_runtime.kind != "qpc":
        raise ConfigError(f"a bundle holds QPCs, and {name} opens {qpc_runtime.kind}: name ai100 or sim")
    check_new(folder)
    for case in cases:
        check(case)
    with temporary_folder() as records:
        members = []
        for case in cases:
            pipeline = runner.pipeline(case)
            recorded = pipeline.record(records)
            qpc = pipeline.artifact("qpc", capabilities(qpc_runtime).sdk).path
            assert qpc is not None
            members.append((_with_texts(case, pipeline.model()), qpc, recorded))
        return write_bundle(folder, members, runtime=name, environment=environment(runner.settings))


def _with_texts(case: Case, model: Any) -> Case:
    """Return a case that holds its texts or pairs instead of naming their file, which another host need not have."""
    files = [name for name in case.inputs.given() if name.endswith("_file")]
    if not files:
        return case
    name = files[0].removesuffix("_file")
    given = model.asked()[name] if isinstance(model, Prechecked) else None
    return case.model_copy(update={"inputs": Inputs.model_validate({name: given})})


class Runner:
    """Runs one (case, runtime) at a time; what a case's runtimes share is made once while the case stays the same."""

    def __init__(
        self,
        *,
        store: Path | str | None = None,
        settings: Settings | None = None,
        progress: Progress | None = None,
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.settings = settings or Settings()
        self._store, self._progress = Store(store), progress or Silent()
        self._model, self._tokenizer = model, tokenizer
        self._runtimes: dict[str, Runtime] = {}
        self._pipeline: Pipeline | None = None

    def runtime(self, name: str) -> Runtime:
        """Return the runtime of this name, created once; what opens files may do so in a child process."""
        if name not in self._runtimes:
            direct = runtime(name, self.settings)
            self._runtimes[name] = IsolatedRuntime(direct, name, self.settings) if direct.kind != "module" else direct
        return self._runtimes[name]

    def result(self, case: Case, name: str, explain: ExplainMode = "off") -> Result:
        """Run and judge a case on a runtime; whatever goes wrong in it becomes a result."""
        pipeline, on = self.pipeline(case), self.runtime(name)
        return with_explanation(pipeline, on, pipeline.result(on), self.settings, explain)

    def explained(self, case: Case, name: str, *, repro: Path | None = None) -> Result:
        """Run and judge a case on a runtime, and explain the result, even if it passes.

        Args:
            case: the case.
            name: of the runtime.
            repro: folder for a bundle that shows the error by itself.
        """
        pipeline, on = self.pipeline(case), self.runtime(name)
        result = pipeline.result(on)
        return explained(pipeline, on, result, self.settings, LIMITS_S["full"], repro) if result.metrics else result

    def audited(self, case: Case) -> RangeAudit:
        """Return what fp16 does to the values of each node of a case's graph; errors are those of `tuning.audit`."""
        return audit(self.pipeline(case), self.settings)

    def tuned(self, case: Case, name: str) -> Tuning:
        """Look for the nodes in float32 with which a case passes on a runtime; errors are those of `tuning.tune`."""
        return tune(case, self.runtime(name), self.settings, self.pipeline)

    def relation(self, case: Case, name: str, relation: str) -> Result:
        """Judge a metamorphic relation of a case on a runtime; what held before is taken from the store."""
        return self.pipeline(case).relation(self.runtime(name), relation, settings=self.settings)

    def timed(self, case: Case, name: str, baseline: TimingBaseline | None = None) -> Result:
        """Time a case on a runtime and judge it; whatever goes wrong becomes a result."""
        timed_runtime = self.runtime(name)

        def prepare() -> None:
            if baseline is not None and baseline.case is not None:
                build_costs(self.pipeline(baseline.case), timed_runtime)

        pipeline = Pipeline(case, check(case), self._store, self._progress)
        return measure_case(pipeline, timed_runtime, self.settings, baseline=baseline, prepare=prepare)

    def pipeline(self, case: Case) -> Pipeline:
        """Return the case's pipeline, the same one as long as the case stays the same."""
        if self._pipeline is None or self._pipeline.case != case:
            self._pipeline = None  # let go of the last case's module before the next is loaded
            self._pipeline = Pipeline(
                case, check(case), self._store, self._progress, model=self._model, tokenizer=self._tokenizer
            )
        return self._pipeline


def selftest(
    cases: Sequence[Case],
    *,
    title: str,
    seeds: int = 20,
    stages: Sequence[Stage] = ("fp32", "device"),
    progress: Callable[[str], None] = lambda _: None,
) -> Score:
    """Put faults into cases and count which are found; run legitimate variants and count which are called faulty.

    Args:
        cases: healthy ones, whose verdicts pass; each gets every mutant of its model kind.
        title: of the score.
        seeds: of the legitimate variants; the cases with random weights take turns.
        stages: ``fp32``, ``device`` (on the simulated card), or both.
        progress: is told of each step.

    Raises:
        ConfigError: a case is none that this can be done with.
        ValidateError: a case does not pass without a fault.
    """
    from qeff_validate.selftest.run import run_mutants, run_variants
    from qeff_validate.selftest.score import Score

    for case in cases:
        check(case)
        if case.tolerance == "table" or case.artifacts != Artifacts():
            raise ConfigError(f"case {case.name!r}: selftest needs tolerance: auto, and no artifacts of your own")
    with temporary_folder() as folder:
        store, graphs = Store(folder / "store"), folder / "graphs"

        def pipeline(case: Case) -> Pipeline:
            return Pipeline(case, check(case), store, Silent())

        outcomes = [one for case in cases for one in run_mutants(case, pipeline, graphs, progress, stages)]
        random = [case for case in cases if case.source.startswith("random:")]
        alarms = list(run_variants(random, seeds, pipeline, graphs, progress, stages)) if random else []
    return Score(title, tuple(outcomes), tuple(alarms))


def model(case: Case, *, given: Any = None, tokenizer: Any = None) -> Model:
    """Return the model wrapper of a case: its inputs, reference, module and verdict.

    Args:
        case: what to wrap; nothing is loaded yet.
        given: a torch model in memory instead of the case's source.
        tokenizer: of ``given``.

    Raises:
        ConfigError: an option or the source is wrong.
        Unavailable: the source is not here.

    Examples:
        >>> wrapper = model(Case(name="small", source="random:bert", inputs={"texts": ["a", "b c", "d"]}))
        >>> inputs = wrapper.inputs(wrapper.tokenize())
        >>> [ids.tolist() for ids in inputs.ids[:2]]
        [[1, 55, 2], [1, 693, 847, 2]]
        >>> print(*wrapper.interface(inputs).outputs)
        output: float32[batch_size, hidden]
    """
    return model_kind(case).create(case, check(case), given, tokenizer)


def build(
    what: Any,
    kind: Kind = "onnx",
    *,
    case: Case | None = None,
    tokenizer: Any = None,
    store: Path | str | None = None,
    sdk: Sdk | None = None,
) -> Artifact:
    """Return an artifact of a model: ``module``, ``onnx``, or ``qpc`` with the compiler of an SDK.

    Args:
        what: a case; a source such as ``path:DIR`` or ``random:bert``; a torch model in memory, which is left unchanged
            (without a case an embedding with mean pooling, or as a `PooledModel` says); or a wrapper from `model`.
        kind: what to build.
        case: gives options, compile options and precision for what is no case; default: those of a case that says
            nothing, or the wrapper's own.
        tokenizer: of a model in memory.
        store: directory of the artifact store.
        sdk: whose compiler; default: the simulated one.

    Raises:
        ConfigError: the kind is unknown, or there is no model in ``what``.
        BuildError: export or compilation failed.

    Examples:
        >>> case = Case(name="small", source="random:bert", exporter="torchscript")
        >>> build(case).path.name
        'model.onnx'
        >>> import numpy as np
        >>> from qeff_validate import runtime
        >>> ids = np.array([[2, 5, 3]])
        >>> with runtime("torch").open(build("random:bert", "module")) as session:
        ...     session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["output"].shape
        (1, 64)
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"no kind of artifact is called {kind!r}.{suggest(kind, get_args(Kind))}")
    wrapper, owner = _wrapped(what, case, tokenizer)
    return Pipeline(owner, None, Store(store), Silent(), wrapper=wrapper).artifact(kind, sdk or simulated())


def _wrapped(what: Any, case: Case | None, tokenizer: Any) -> tuple[Model, Case]:
    """Return the model wrapper of what a user hands to `build`, and its case."""
    if isinstance(what, Case):
        return model(what), case or what
    if isinstance(what, str):
        owner = case or case_for(what)
        return model(owner.model_copy(update={"source": what})), owner
    if hasattr(what, "named_parameters"):  # a torch module, without an import of torch
        owner = case or Case(name="model", source="memory", options=options_of_model(what))
        return model(owner, given=what, tokenizer=tokenizer), owner
    found: Case | None = case or getattr(what, "case", None)
    if found is None:
        raise ConfigError(
            f"build takes a case, a source, a torch model or a wrapper from qv.model, not {type(what).__name__}; a"
            " wrapper that carries no case needs case=…"
        )
    return what, found


def options_of_model(given: Any) -> dict[str, Any]:
    """Return the options that a model in memory decides: pooling, normalize and truncate_dim of a `PooledModel`."""
    if not hasattr(given, "named_parameters"):
        return {}
    from qeff_validate.models.embedding.pooling import PooledModel

    if not isinstance(given, PooledModel):
        return {}
    return {"pooling": given.pooling, "normalize": given.normalize, "truncate_dim": given.truncate_dim}


def environment(settings: Settings) -> dict[str, Any]:
    """Return what a reader of a report needs to know of where it was made."""
    sdk = installed(settings.sdk)
    kernels = {"kernels": {name: os.environ[name] for name in sorted(KERNELS) if name in os.environ}}
    if settings.ort_optimization is not None:
        kernels["kernels"]["ort_optimization"] = settings.ort_optimization
    names = ("qeff-validate", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy", "peft")
    return {
        "versions": {"python": platform.python_version(), **versions(*names)},
        "sdk": {"prefix": str(sdk.prefix), **sdk.versions()} if sdk.prefix.is_dir() else None,
        "simulated_sdk": simulated().versions(),
        "cards": [{"qid": card.qid, **card.values} for card in sdk.cards()] if sdk.prefix.is_dir() else [],
        "host": {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count(), **kernels},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
