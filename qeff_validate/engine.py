# SPDX-License-Identifier: Apache-2.0
"""The only place where the pieces meet: case → model → artifact → runtime → tensors → verdict → report."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from qeff_validate.artifact import Artifact, Kind, fingerprint
from qeff_validate.builders.source_keys import code_key, measures_key
from qeff_validate.builders.store import Store
from qeff_validate.config.case import Artifacts, Case, Inputs
from qeff_validate.config.explain import explain as explain_config
from qeff_validate.config.loader import load_cases
from qeff_validate.config.yaml_reader import parse_yaml
from qeff_validate.errors import ConfigError, IncomparableError, ValidateError, naming_extras, suggest
from qeff_validate.files import temporary_folder
from qeff_validate.folders import check_writable
from qeff_validate.models.framework_calls import versions
from qeff_validate.pipeline.case_check import check
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.executors.in_process import Executor, InProcess
from qeff_validate.pipeline.executors.local_processes import LocalProcesses
from qeff_validate.pipeline.explanation import ExplainMode
from qeff_validate.pipeline.machine import KERNELS, available_mb
from qeff_validate.pipeline.performance import (
    TimingBaseline,
    check_performance,
    stored_measurements,
)
from qeff_validate.pipeline.runner import Runner
from qeff_validate.pipeline.stages import NumberedProgress, Progress, Silent
from qeff_validate.protocols import Model, Prechecked, Settings, capabilities, model_kind
from qeff_validate.report.lazy_results import planned_results
from qeff_validate.report.notebook_progress import in_notebook, notebook_progress
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result
from qeff_validate.report.step_times import STEP_TIMES
from qeff_validate.sdk.locate import Sdk, installed, simulated

if TYPE_CHECKING:
    from qeff_validate.selftest.run import Stage
    from qeff_validate.selftest.score import Score


__all__ = [
    "Runner",
    "build",
    "bundle",
    "case_for",
    "check",
    "environment",
    "load",
    "model",
    "options_of_model",
    "perf",
    "result_key",
    "selftest",
    "validate",
    "worker_pool",
]


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
    jobs: int = 1,
    cluster: str | None = None,
    known: Mapping[tuple[str, str], Result] | None = None,
    on_result: Callable[[Case, Result], object] | None = None,
    results: MutableMapping[tuple[str, str], Result] | None = None,
) -> Report:
    """Run cases on runtimes and compare every output with the Hugging Face reference.

    Args:
        case: one case or several.
        runtimes: instead of those that the cases name.
        model: an in-memory torch model instead of the case's source; it is left unchanged.
        tokenizer: the tokenizer of ``model``.
        store: directory of the artifact store, or its URL (fsspec); default: ``$QEFF_VALIDATE_HOME``, else the user's
            cache.
        settings: SDK prefix, cards, threads.
        progress: is told of each long step; default: a line below the cell in a notebook, nothing elsewhere.
        record: directory for each case's inputs, reference outputs and floor, ``CASE.safetensors``.
        fail_fast: after the first result that fails, is inconclusive or an error, the others are ``not_run``.
        explain: whether results that fail get an explanation: ``off``, ``auto`` (within a minute each) or ``full``.
        jobs: how many processes run stages of cases side by side; the processors are divided among them. 1: none, all
            is done here.
        cluster: address of a Ray cluster whose hosts do the stages instead, sharing the store's directory or URL;
            ``local``: a cluster of this host alone. ``jobs`` above 1 then limits the number of workers.
        known: results of an earlier run by case and runtime, which are not made again.
        on_result: is told of each result as it is made.
        results: takes each result as it is made, by case and runtime, for instance onto a disk; those that it holds are
            not made again. The report reads it whenever a result is asked for. None: they are held in memory.

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
    shown = progress or _default_progress(store)
    numbered = NumberedProgress(shown, len(planned))
    runner = Runner(store=store, settings=settings, progress=numbered, model=model, tokenizer=tokenizer)
    for item, name in planned:
        check(item)
        runner.runtime(name)
    installed(runner.settings.sdk)  # the report asks it in the end
    if record is not None:
        check_writable(record, "--record")
    executor: Executor = InProcess(runner, numbered, explain)
    if jobs > 1 or cluster is not None:
        if model is not None:
            raise ConfigError("jobs: a model in memory cannot be handed to other processes: leave jobs and cluster out")
        executor = worker_pool(jobs, cluster, runner, progress=shown, explain=explain)
    done = {} if results is None else results
    done.update(known or {})
    missing = [(item, name) for item, name in planned if (item.name, name) not in done]
    stopped = ""
    with closing(executor.results(missing)) as made:
        for item, name, result in made:
            done[item.name, name] = result
            if on_result is not None:
                on_result(item, result)
            if fail_fast and result.expected is None and result.status in ("fail", "inconclusive", "error"):
                stopped = f"{item.name}-{name}"
                break
    why = f"{stopped} did not pass, and --fail-fast is on"
    ordered: Sequence[Result] = planned_results([(item.name, name) for item, name in planned], done, why)
    if results is None:
        ordered = tuple(ordered)
    unwritten = _record(runner, cases, ordered, record) if record is not None else []
    return Report(ordered, environment(runner.settings), tuple(unwritten))


def worker_pool(
    jobs: int, cluster: str | None, runner: Runner, *, progress: Progress, explain: ExplainMode = "off"
) -> Executor:
    """Return what does the stages of cases side by side.

    Args:
        jobs: number of processes of this host; with a cluster, the greatest number of workers, and 1 is no limit.
        cluster: address of a Ray cluster, or ``local``; None: processes of this host.
        runner: whose store and settings the workers use.
        progress: is told of each long step.
        explain: whether results that fail get an explanation.

    Raises:
        MissingPackage: Ray is not installed.
        ConfigError: there is no cluster at this address.
    """
    more: dict[str, Any] = {
        "settings": runner.settings,
        "progress": progress,
        "explain": explain,
        "store": runner.store,
    }
    if cluster is None:
        return LocalProcesses(jobs, runner.runtime, memory_mb=available_mb(), **more)
    from qeff_validate.pipeline.executors.ray_cluster import RayCluster

    with naming_extras():
        return RayCluster(cluster, runner.runtime, jobs=jobs if jobs > 1 else None, **more)


def _record(runner: Runner, cases: Sequence[Case], results: Sequence[Result], folder: Path) -> list[str]:
    """Record the cases that have a result with rows; return why some could not be written."""
    unwritten = []
    for case in cases:
        if any(result.planned for result in results if result.case == case.name):
            try:
                runner.pipeline(case).record(folder)
            except Exception as exc:  # whatever happens to a file, verdicts are kept
                kind = "" if isinstance(exc, ValidateError) else f"unexpected {type(exc).__name__}: "
                unwritten.append(f"{case.name}: not recorded: {kind}{exc}")
    return unwritten


def _default_progress(store: Path | str | None) -> Progress:
    return notebook_progress(Store(store).root / STEP_TIMES) if in_notebook() else Silent()


def result_key(case: Case, name: str, settings: Settings) -> str:
    """Return a digest of what a result is made from, but for the files of its model: case, runtime, code, settings."""
    key = {"case": case.model_dump(mode="json"), "runtime": name, "settings": asdict(settings)}
    return fingerprint({**key, "code": code_key(), "measures": measures_key(), **versions("qeff-validate")})


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
    if not {"texts_file", "pairs_file", "dataset"} & set(case.inputs.given()):
        return case
    asked = model.asked() if isinstance(model, Prechecked) else {}
    name = "pairs" if "pairs" in asked else "texts"
    return case.model_copy(update={"inputs": Inputs.model_validate({name: asked.get(name)})})


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
