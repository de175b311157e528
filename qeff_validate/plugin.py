# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: options, markers, fixtures, header and summary. Loads no framework."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest

from qeff_validate.registry import is_built_in, registered
from qeff_validate.session_outcome import NO_TARGET, NOTHING_COMPARED, SessionOutcome, Target

if TYPE_CHECKING:
    from qeff_validate.config.case import Case
    from qeff_validate.engine import Runner
    from qeff_validate.pipeline.executors.awaited_results import AwaitedResults
    from qeff_validate.pipeline.explanation import ExplainMode
    from qeff_validate.protocols import Session
    from qeff_validate.report.report import Report
    from qeff_validate.report.result import Result

pytest.register_assert_rewrite("qeff_validate.suites")

MARKERS = {
    "ai100": "runs on a Cloud AI 100 card; skipped with the reason where there is none",
    "sim": "runs on the simulated AI 100 SDK",
    "ort": "runs on ONNX Runtime",
    "torch": "runs the exported module in PyTorch",
    "embedding": "validates an embedding model",
    "peft": "validates a causal language model with adapters",
    "multi_vector": "validates a multi-vector model",
    "reranker": "validates a reranker",
    "sequence_classification": "validates a model that classifies texts",
    "sparse_embedding": "validates a sparse embedding model",
    "plugin_kinds": "validates models of kinds without a suite of their own, those of plug-ins among them",
    "slow": "takes more than a few seconds",
    "perf": "times a case and judges its budgets; off under pytest-xdist, unless the runtime locks a device",
}

KIND_MARKS = frozenset(MARKERS) - {"ai100", "sim", "ort", "torch", "slow", "perf"}
"""Marks by which a test takes the cases of one model kind; a test with none of them takes all cases."""

SUITES = frozenset({"embedding", "peft"})
"""Marks of the suites that are made for one kind; `GENERIC_SUITE` takes the cases of all other kinds."""

SUITE_FOLDER = Path(__file__).parent / "suites"

GENERIC_SUITE = SUITE_FOLDER / "test_models.py"

TIMING_SUITE = GENERIC_SUITE.with_name("test_performance.py")
"""Takes the cases of every kind that have a section ``performance``."""

CARD = "ai100"
"""The runtime that is also collected for cases that do not name it, if ``-m`` or ``--qv-require`` asks for it."""

OPTIONS = {
    "config": "config file with cases; may be given more than once (default: a small random BERT)",
    "model": "a source instead of a config, e.g. random:bert or path:DIR",
    "runtimes": "comma-separated runtimes, instead of those that the cases name",
    "require": "comma-separated runtimes that must run: 'not run' is a failure",
    "report": "directory for report.json, report.md and report.html",
    "reporters": "comma-separated reporters that get the report too, such as mlflow",
    "store": "directory of the artifact store, or its URL",
    "sdk": "prefix of the AI 100 SDK",
    "device-ids": "comma-separated ids of the cards to use",
    "jobs": "processes that run stages of all cases side by side, or auto (not with -n, which runs whole tests)",
    "cluster": "address of a Ray cluster that runs the cases (relations and timings run here), or local",
    "explain": "say where failures come from: off; auto, within a minute each (default); full, within an hour each",
    "run-timeout": "seconds after which a run is ended that gives no answer (ai100, sim, a user's ONNX file)",
}

_CASES: pytest.StashKey[Any] = pytest.StashKey()
_RESULT: pytest.StashKey[Any] = pytest.StashKey()
_OUTCOME: pytest.StashKey[SessionOutcome] = pytest.StashKey()
_REPORT: pytest.StashKey[Report] = pytest.StashKey()
_PROBLEMS: pytest.StashKey[list[str]] = pytest.StashKey()
_REMOVED: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--qv-*`` and the same names as ini options."""
    group = parser.getgroup("qeff_validate", "validation of models across runtimes")
    for name, text in OPTIONS.items():
        many = name == "config"
        action = "append" if many else "store"
        kind: Literal["linelist", "string"] = "linelist" if many else "string"
        group.addoption(f"--qv-{name}", action=action, default=None, metavar=name.upper(), help=text)
        parser.addini(f"qv_{name.replace('-', '_')}", text, type=kind)
    text = "do not count inconclusive results as failures"
    group.addoption("--qv-allow-inconclusive", action="store_true", default=False, help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Register what collects the reports of the suites; and the markers, where suites or cases are used at all.

    Elsewhere ``slow``, ``torch`` and the like stay unknown, so that ``--strict-markers`` finds a misspelt marker.
    """
    config.stash[_OUTCOME] = SessionOutcome()
    config.pluginmanager.register(config.stash[_OUTCOME], "qeff_validate-outcome")
    used = _asked(config) or any(option(config, name) for name in OPTIONS)
    for name, text in {**_plugin_markers(), **MARKERS}.items() if used else ():
        config.addinivalue_line("markers", f"{name}: {text}")


def _plugin_markers() -> dict[str, str]:
    """Return a marker for each registered runtime, and for the suite of each model kind of a plug-in."""
    markers = {name: f"runs on {name}" for name in registered("runtimes")}
    for entry in registered("models").values():
        if not is_built_in(entry):  # nothing of ours is loaded for unrelated tests
            with suppress(Exception):  # a plug-in that cannot be imported is told where a case names it
                markers[entry.load().suite] = f"validates a model of the kind {entry.name}"
    return markers


def option(config: pytest.Config, name: str) -> Any:
    """Return an option from the command line, else from the ini file, else None."""
    value = config.getoption(f"--qv-{name}")
    return value if value else config.getini(f"qv_{name.replace('-', '_')}") or None


def _listed(config: pytest.Config, name: str) -> list[str]:
    return [part.strip() for part in (option(config, name) or "").split(",") if part.strip()]


def _place(config: pytest.Config, name: str) -> Path | None:
    """Return a directory: from the command line relative to where pytest was called, else to the ini file."""
    given: str | None = config.getoption(f"--qv-{name}")
    if given:
        return config.invocation_params.dir / given
    written: str = config.getini(f"qv_{name}")
    return _ini_folder(config) / written if written else None


def _ini_folder(config: pytest.Config) -> Path:
    return config.inipath.parent if config.inipath else config.rootpath


def _configs(config: pytest.Config) -> list[Path]:
    given = config.getoption("--qv-config")
    if given:
        return [config.invocation_params.dir / path for path in given]
    found = [_ini_folder(config) / path for path in config.getini("qv_config")]
    return found or [Path(__file__).parent / "suites" / "default.yaml"]


def _cases(config: pytest.Config) -> Sequence[Case]:
    from qeff_validate.engine import case_for, load
    from qeff_validate.errors import ConfigError, suggest

    if _CASES not in config.stash:
        try:
            source = option(config, "model")
            config.stash[_CASES] = [case_for(source)] if source else load(_configs(config))
        except ConfigError as exc:
            raise pytest.UsageError(str(exc)) from exc
        for name in _listed(config, "runtimes") + _listed(config, "require"):
            if name not in registered("runtimes"):
                raise pytest.UsageError(f"no runtime is called {name!r}.{suggest(name, registered('runtimes'))}")
        _check_marks(config)
    cases: Sequence[Case] = config.stash[_CASES]
    return cases


def _check_marks(config: pytest.Config) -> None:
    """Refuse marks that decide whether a test counts, and unknown ones under ``--strict-markers``."""
    from qeff_validate.errors import suggest

    # such as "slow: takes long" and "flaky(reruns=1): runs again"; what takes arguments does more than select
    signatures = [line.partition(":")[0].strip() for line in config.getini("markers")]
    known = {signature.partition("(")[0].strip(): "(" in signature for signature in signatures}
    for case in config.stash[_CASES]:
        for mark in case.marks:
            place = f"case {case.name!r}: marks: {mark!r}"
            if known.get(mark):
                raise pytest.UsageError(f"{place} has a meaning of its own here, and marks of cases only select tests")
            if mark not in known and _strict_markers(config):
                raise pytest.UsageError(
                    f"{place} is not registered, and --strict-markers is on.{suggest(mark, known)} Or add it to"
                    " markers in the ini file"
                )


def _strict_markers(config: pytest.Config) -> bool:
    if getattr(config.option, "strict_markers", False):  # before pytest 9
        return True
    for name in ("strict_markers", "strict"):
        with suppress(KeyError, ValueError):
            value = config.getini(name)
            if value is not None:
                return bool(value)
    return False


def _run_timeout(config: pytest.Config) -> float:
    from qeff_validate.errors import ConfigError
    from qeff_validate.protocols import Settings

    limit = option(config, "run-timeout")
    try:
        return Settings().run_timeout_s if limit is None else Settings(run_timeout_s=float(limit)).run_timeout_s
    except (ValueError, ConfigError) as exc:
        raise pytest.UsageError(f"--qv-run-timeout: wanted seconds, got {limit!r}: {exc}") from exc


def _jobs(config: pytest.Config) -> int:
    """Return how many processes ``--qv-jobs`` asks for; 1: it was not given."""
    from qeff_validate.cli.options import job_count
    from qeff_validate.errors import ConfigError

    try:
        return job_count(option(config, "jobs") or "1", "--qv-jobs")
    except ConfigError as exc:
        raise pytest.UsageError(str(exc)) from exc


def _check_jobs(config: pytest.Config) -> None:
    """Refuse a wrong number of processes, and workers of pytest-xdist beside them."""
    if not (option(config, "jobs") or option(config, "cluster")):
        return
    _jobs(config)
    if _is_worker(config) or config.getoption("numprocesses", None):
        raise pytest.UsageError("--qv-jobs and --qv-cluster run stages of cases side by side: leave out -n")


def _explain_mode(config: pytest.Config) -> ExplainMode:
    from qeff_validate.pipeline.explanation import ExplainMode

    mode = option(config, "explain") or "auto"
    found: ExplainMode | None = next((known for known in get_args(ExplainMode) if known == mode), None)
    if found is None:
        raise pytest.UsageError(f"--qv-explain: wanted {', '.join(get_args(ExplainMode))}, got {mode!r}")
    return found


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Give a suite of ours an id that can be pasted after ``--pyargs``, wherever this package is installed."""
    if module_path.parent != SUITE_FOLDER:
        return None
    module: pytest.Module = pytest.Module.from_parent(
        parent, path=module_path, nodeid=f"qeff_validate.suites.{module_path.stem}"
    )
    return module


def _check_reporters(config: pytest.Config) -> None:
    """Refuse an unknown reporter, and one whose package is not installed, before anything is run."""
    names = _listed(config, "reporters")
    if names:
        from qeff_validate.errors import ValidateError
        from qeff_validate.report.reporters import load_reporters

        try:
            load_reporters(names)
        except ValidateError as exc:
            raise pytest.UsageError(f"--qv-reporters: {exc}") from exc


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Check what was asked for before anything is collected: a usage error must not look like a broken test file."""
    config = session.config
    if option(config, "run-timeout"):
        _run_timeout(config)
    if option(config, "explain"):
        _explain_mode(config)
    _check_jobs(config)
    _check_reporters(config)
    if any(option(config, name) for name in ("config", "model", "runtimes", "require")):
        _cases(config)
    path = _place(config, "report")
    if path is not None and _report_wanted(config) and not (_only_shown(config) or _is_worker(config)):
        from qeff_validate.errors import ConfigError
        from qeff_validate.folders import check_writable

        try:
            check_writable(path, "--qv-report")
        except ConfigError as exc:
            raise pytest.UsageError(str(exc)) from exc
        _remove_old_report(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize suites over case × runtime."""
    if "qv_target" not in metafunc.fixturenames:
        return
    from qeff_validate.protocols import model_kind

    if "qv_timing" in metafunc.fixturenames:
        chosen = _listed(metafunc.config, "runtimes")
        metafunc.parametrize("qv_target", [*_timing_params(_cases(metafunc.config), chosen)])
        return
    suites = {mark.name for mark in metafunc.definition.iter_markers()}
    of_all_kinds = not suites & {*KIND_MARKS, *(model_kind(case).suite for case in _cases(metafunc.config))}
    by_relation = "qv_relation_name" in metafunc.fixturenames
    params = []
    for case in _cases(metafunc.config):
        kind = model_kind(case)
        generic = "plugin_kinds" in suites and kind.suite not in SUITES
        if not (of_all_kinds or generic or kind.suite in suites):
            continue
        for name in _runtimes(metafunc.config, case):
            marks = [getattr(pytest.mark, mark) for mark in dict.fromkeys((name, kind.suite, *case.marks))]
            target, test = (case, name), f"{case.name}-{name}"
            if by_relation:
                params += [
                    pytest.param(target, relation, id=f"{test}-{relation}", marks=marks) for relation in kind.relations
                ]
            else:
                params.append(pytest.param(target, id=test, marks=marks))
    metafunc.parametrize("qv_target, qv_relation_name" if by_relation else "qv_target", params)


def _timing_params(cases: Sequence[Case], chosen: Sequence[str]) -> Iterator[Any]:
    from qeff_validate.protocols import model_kind

    for case in cases:
        if case.performance is None:
            continue
        own = case.performance.runtimes or case.runtimes
        for name in (name for name in own if not chosen or name in chosen):
            marks = [getattr(pytest.mark, mark) for mark in dict.fromkeys((name, model_kind(case).suite, *case.marks))]
            yield pytest.param((case, name), id=f"{case.name}-{name}", marks=marks)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out suites that no case belongs to: they would be a skipped test in every run."""
    if collection_path == TIMING_SUITE:
        return None if any(True for _ in _timing_params(_cases(config), _listed(config, "runtimes"))) else True
    if collection_path != GENERIC_SUITE:
        return None
    from qeff_validate.protocols import model_kind

    return None if any(model_kind(case).suite not in SUITES for case in _cases(config)) else True


def _runtimes(config: pytest.Config, case: Case) -> list[str]:
    """Return the runtimes of ``--qv-runtimes``, else of the case; the card too, if it is asked for by name.

    ``-m ai100`` finds tests with any config, so a host with a card needs no config of its own; without it no test is
    collected that is skipped on every other host.
    """
    chosen = _listed(config, "runtimes")
    if chosen:
        return list(dict.fromkeys(chosen))
    card = CARD in _listed(config, "require") or re.search(rf"\b{CARD}\b", config.option.markexpr or "")
    return list(dict.fromkeys([*case.runtimes, *([CARD] if card else [])]))


@pytest.fixture(scope="session")
def qv_runner(request: pytest.FixtureRequest) -> Runner:
    """The engine, with the session's store, SDK and cards."""
    from qeff_validate.engine import Runner
    from qeff_validate.protocols import Settings

    config = request.config
    ids = _listed(config, "device-ids")
    if not all(text.isdecimal() for text in ids):
        raise pytest.UsageError(f"--qv-device-ids: wanted numbers, got {ids}")
    settings = Settings(sdk=option(config, "sdk"), device_ids=tuple(int(text) for text in ids))
    settings = replace(settings, run_timeout_s=_run_timeout(config))
    written = option(config, "store") or ""
    return Runner(store=written if "://" in written else _place(config, "store"), settings=settings)


@pytest.fixture(scope="session")
def _qv_awaited(request: pytest.FixtureRequest, qv_runner: Runner) -> Generator[AwaitedResults | None, None, None]:
    """The results that ``--qv-jobs`` or ``--qv-cluster`` makes elsewhere; None: each is made here."""
    from qeff_validate.engine import worker_pool
    from qeff_validate.errors import ValidateError
    from qeff_validate.pipeline.executors.awaited_results import AwaitedResults
    from qeff_validate.pipeline.stages import Silent

    config = request.config
    jobs, cluster = _jobs(config), option(config, "cluster")
    if jobs == 1 and cluster is None:
        yield None
        return
    planned = dict(_planned(request.session.items))
    try:
        executor = worker_pool(jobs, cluster, qv_runner, progress=Silent(), explain=_explain_mode(config))
    except ValidateError as exc:
        pytest.exit(str(exc), returncode=pytest.ExitCode.USAGE_ERROR)
    awaited = AwaitedResults(executor, [*planned.values()])
    with closing(awaited):
        yield awaited


@pytest.fixture
def qv_result(
    request: pytest.FixtureRequest,
    qv_runner: Runner,
    _qv_awaited: AwaitedResults | None,
    qv_target: tuple[Case, str],
) -> Result:
    """The result of one case on one runtime; skips with the reason if the runtime is not usable here."""
    case, name = qv_target
    if _qv_awaited is not None and (case.name, name) in _qv_awaited:
        return _usable(request, _qv_awaited.get(case.name, name))
    return _usable(request, qv_runner.result(case, name, _explain_mode(request.config)))


@pytest.fixture
def qv_timing(request: pytest.FixtureRequest, qv_runner: Runner, qv_target: tuple[Case, str]) -> Result:
    """The timings of one case on one runtime, judged; skips where workers of pytest-xdist would disturb each other."""
    from qeff_validate.protocols import capabilities

    case, name = qv_target
    able = capabilities(qv_runner.runtime(name))
    if _is_worker(request.config) and (able.sdk is None or able.simulated):  # a card is locked by who opens it
        pytest.skip(
            f"timings of {name} are off under pytest-xdist, whose workers share the processors: run -m perf -n 0"
        )
    return _usable(request, qv_runner.timed(case, name))


@pytest.fixture
def qv_relation(
    request: pytest.FixtureRequest, qv_runner: Runner, qv_target: tuple[Case, str]
) -> Callable[[str], Result]:
    """A function that judges a metamorphic relation by its name; skips as `qv_result` does."""
    case, name = qv_target
    return lambda relation: _usable(request, qv_runner.relation(case, name, relation))


@pytest.fixture
def qv_session(
    request: pytest.FixtureRequest, qv_runner: Runner, qv_target: tuple[Case, str]
) -> Generator[Session, None, None]:
    """What a runtime opens for a case; skips with the reason if the runtime is not usable here."""
    case, name = qv_target
    runtime = qv_runner.runtime(name)
    missing = runtime.probe()
    if missing:
        if name in _listed(request.config, "require"):
            pytest.fail(f"{name} is required and did not run: {missing}", pytrace=False)
        pytest.skip(missing)
    with qv_runner.pipeline(case).session(runtime) as session:
        yield session


@pytest.fixture
def qv_adapters(qv_runner: Runner, qv_target: tuple[Case, str]) -> frozenset[str]:
    """The names of the tensors that the adapters of a case have."""
    adapters = qv_runner.pipeline(qv_target[0]).inputs().adapters
    return frozenset(name for tensors in adapters.values() for name in tensors)


def _usable(request: pytest.FixtureRequest, result: Result) -> Result:
    request.node.stash[_RESULT] = result.plain()
    properties = request.node.user_properties  # these reach a JUnit file under xdist too
    properties += [("qv_status", result.status), ("qv_simulated", result.simulated)]
    properties += [(f"qv_{item.metric.name}", repr(item.metric.value)) for item in result.metrics]
    if result.status == "not_run":
        unusable = result.stage is None  # else the runtime works, and the relation does not apply to this case
        if unusable and result.runtime in _listed(request.config, "require"):
            pytest.fail(f"{result.runtime} is required and did not run: {result.reason}", pytrace=False)
        pytest.skip(result.reason)
    if result.expected is not None:
        pytest.xfail(f"{result.status}, expected: {result.expected}")
    if result.status == "inconclusive" and request.config.getoption("--qv-allow-inconclusive"):
        pytest.skip(f"inconclusive: {result.reason}")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Attach case, runtime and result to the report, so that they reach the controller under xdist too."""
    report = yield
    target = _target(item)
    if target is not None:
        report.qv_target = list(target)
    plain = item.stash.get(_RESULT, None)
    if plain is not None:
        report.qv_result = plain
        del item.stash[_RESULT]
        _show_numbers(item.config, report, plain)
    return report


def _show_numbers(config: pytest.Config, report: pytest.TestReport, plain: Mapping[str, Any]) -> None:
    """Hand the metrics of a test to pytest-html and Allure, where one of them is installed and writes a report."""
    numbers = "\n".join(_number_line(metric) for metric in plain["metrics"])
    if not numbers:
        return
    shown = f"<pre>{escape(numbers)}</pre>"
    extra = {"name": "metrics", "format_type": "html", "content": shown, "mime_type": None, "extension": None}
    report.extras = [*getattr(report, "extras", []), extra]  # type: ignore[attr-defined]
    if config.pluginmanager.hasplugin("allure_pytest"):
        allure: Any = import_module("allure")
        allure.attach(numbers, "metrics", allure.attachment_type.TEXT)


def _number_line(metric: Mapping[str, Any]) -> str:
    """Return a metric of a plain result as ``name = value (bound …, source)``; a value may be the string nan or inf."""
    bound = "no bound" if metric["bound"] is None else f"bound {metric['bound']}, {metric['source']}"
    return f"{metric['name']} = {metric['value']} ({bound})"


def _planned(items: Sequence[pytest.Item]) -> Iterator[tuple[Target, tuple[Case, str]]]:
    """Yield the cases and runtimes whose results tests ask for."""
    for item in items:
        target = _target(item)
        if isinstance(item, pytest.Function) and "qv_result" in item.fixturenames and target not in (None, NO_TARGET):
            chosen: Any = item.callspec.params["qv_target"]
            yield target, chosen


def _target(item: pytest.Item) -> Target | None:
    """Return case and runtime of a test that uses ``qv_target``, None of another one."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "qv_target" not in parameters:
        return None
    target = parameters["qv_target"]
    return (target[0].name, target[1]) if isinstance(target, tuple) else NO_TARGET


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what the suites are set up with, if anything was set."""
    values = {name: option(config, name) for name in OPTIONS}
    chosen = ", ".join(f"{name}={value}" for name, value in values.items() if value)
    return [f"qeff_validate: {chosen}"] if chosen else []


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Note which tests are about to run; the report of an earlier run goes before the first of them."""
    config = session.config
    if _only_shown(config):
        return
    config.stash[_OUTCOME].running = True
    config.stash[_OUTCOME].planned |= {
        item.nodeid: target for item in getattr(session, "items", []) if (target := _target(item))
    }
    _remove_old_report(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Note what a worker is about to run."""
    outcome = node.config.stash[_OUTCOME]
    runtimes = [*registered("runtimes")]
    if any(f"-{name}" in test for test in ids for name in runtimes):  # else leave the engine alone
        targets = {
            f"{case.name}-{name}": (case.name, name)
            for case in _cases(node.config)
            for name in _runtimes(node.config, case)
        }
        outcome.add_ids(ids, targets)
    _remove_old_report(node.config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the report; nothing compared, a required runtime that did not run, or a lost test is no success."""
    config = session.config
    outcome = config.stash[_OUTCOME]
    if _is_worker(config) or not outcome.running:
        return
    outcome.stopped = str(session.shouldfail or session.shouldstop or ("interrupted" if exitstatus == 2 else ""))
    asked = _asked(config) or bool(config.getoption("--qv-require"))
    problems = outcome.problems(_listed(config, "require"), asked=asked)
    if _report_wanted(config):
        problems += _concluded(config, outcome)
    config.stash[_PROBLEMS] = problems
    if problems and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = NOTHING_COMPARED


def _concluded(config: pytest.Config, outcome: SessionOutcome) -> list[str]:
    """Make the report of a session and write it; return why it could not be written."""
    from qeff_validate.engine import environment
    from qeff_validate.errors import ValidateError
    from qeff_validate.protocols import Settings
    from qeff_validate.report.report import Report
    from qeff_validate.report.reporters import load_reporters, send_report

    config.stash[_REPORT] = Report(tuple(outcome.all_results()), environment(Settings(sdk=option(config, "sdk"))))
    path = _place(config, "report")
    try:
        if path is not None:
            config.stash[_REPORT].write(path)
        send_report(config.stash[_REPORT], load_reporters(_listed(config, "reporters")))
    except ValidateError as exc:
        return [str(exc)]
    return []


def _annotations(config: pytest.Config, report: Report) -> list[str]:
    """Return annotations of the results that fail, in a job of GitHub Actions."""
    from qeff_validate.config.loader import case_places
    from qeff_validate.report.annotations import github_annotations, on_github

    if not on_github():
        return []
    places = {} if option(config, "model") else case_places(_configs(config))
    allowed = bool(config.getoption("--qv-allow-inconclusive"))
    return list(
        github_annotations(report.results, places, require=_listed(config, "require"), allow_inconclusive=allowed)
    )


def _remove_old_report(config: pytest.Config) -> None:
    """Remove the report of an earlier run, if this one will write its own."""
    path = _place(config, "report")
    if path is not None and _report_wanted(config) and not _is_worker(config) and not config.stash.get(_REMOVED, False):
        from qeff_validate.report.writers import remove_reports

        remove_reports(path)
        config.stash[_REMOVED] = True


def _only_shown(config: pytest.Config) -> bool:
    """Say whether tests are listed and not run."""
    return bool(config.option.collectonly or getattr(config.option, "setupplan", False))


def _report_wanted(config: pytest.Config) -> bool:
    """Say whether this session writes a report; a directory in the ini file is for sessions with the suites alone."""
    return bool(config.stash[_OUTCOME].planned or _asked(config) or config.getoption("--qv-report"))


def _asked(config: pytest.Config) -> bool:
    """Say whether the command line names the suites."""
    return any("qeff_validate.suites" in text.replace("/", ".") for text in map(str, config.args))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was compared and proved, and why the session is no success."""
    report, problems = config.stash.get(_REPORT, None), config.stash.get(_PROBLEMS, [])
    if report is None and not problems:
        return
    terminalreporter.section("qeff_validate")
    if report is not None:
        from qeff_validate.report.text import MARKS

        statuses = Counter(str(result.status) for result in report.results)
        counts = ", ".join(f"{statuses[name]} {name}" for name in MARKS)
        terminalreporter.write_line(f"{report.rows_compared} rows compared: {counts}")
        for line in report.closing():
            terminalreporter.write_line(line)
        path = _place(config, "report")
        if path is not None:
            terminalreporter.write_line(f"report: {path / 'report.html'}, {path / 'report.json'}")
        for line in _annotations(config, report):
            terminalreporter.write_line(line)
    for problem in problems:
        terminalreporter.write_line(f"ERROR: {problem}", red=True)
