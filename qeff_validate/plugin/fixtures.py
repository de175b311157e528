# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the suites and of users' tests, and how a result reaches pytest's report of its test."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from qeff_validate.plugin.options import explain_mode, is_worker, job_count_of, listed, option, place, run_timeout
from qeff_validate.session_outcome import NO_TARGET, Target

if TYPE_CHECKING:
    from qeff_validate.config.case import Case
    from qeff_validate.engine import Runner
    from qeff_validate.pipeline.executors.awaited_results import AwaitedResults
    from qeff_validate.protocols import Session
    from qeff_validate.report.result import Result


_RESULT: pytest.StashKey[Any] = pytest.StashKey()


@pytest.fixture(scope="session")
def qv_runner(request: pytest.FixtureRequest) -> Runner:
    """The engine, with the session's store, SDK and cards."""
    from qeff_validate.engine import Runner
    from qeff_validate.protocols import Settings

    config = request.config
    ids = listed(config, "device-ids")
    if not all(text.isdecimal() for text in ids):
        raise pytest.UsageError(f"--qv-device-ids: wanted numbers, got {ids}")
    settings = Settings(sdk=option(config, "sdk"), device_ids=tuple(int(text) for text in ids))
    settings = replace(settings, run_timeout_s=run_timeout(config))
    written = option(config, "store") or ""
    return Runner(store=written if "://" in written else place(config, "store"), settings=settings)


@pytest.fixture(scope="session")
def _qv_awaited(request: pytest.FixtureRequest, qv_runner: Runner) -> Generator[AwaitedResults | None, None, None]:
    """The results that ``--qv-jobs`` or ``--qv-cluster`` makes elsewhere; None: each is made here."""
    from qeff_validate.engine import worker_pool
    from qeff_validate.errors import ValidateError
    from qeff_validate.pipeline.executors.awaited_results import AwaitedResults
    from qeff_validate.pipeline.stages import Silent

    config = request.config
    jobs, cluster = job_count_of(config), option(config, "cluster")
    if jobs == 1 and cluster is None:
        yield None
        return
    planned = dict(_planned(request.session.items))
    try:
        executor = worker_pool(jobs, cluster, qv_runner, progress=Silent(), explain=explain_mode(config))
    except ValidateError as exc:
        pytest.exit(str(exc), returncode=pytest.ExitCode.USAGE_ERROR)
    awaited = AwaitedResults(executor, [*planned.values()])
    with closing(awaited):
        yield awaited


def _planned(items: Sequence[pytest.Item]) -> Iterator[tuple[Target, tuple[Case, str]]]:
    """Yield the cases and runtimes whose results tests ask for."""
    for item in items:
        target = target_of(item)
        if isinstance(item, pytest.Function) and "qv_result" in item.fixturenames and target not in (None, NO_TARGET):
            chosen: Any = item.callspec.params["qv_target"]
            yield target, chosen


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
    return _usable(request, qv_runner.result(case, name, explain_mode(request.config)))


@pytest.fixture
def qv_timing(request: pytest.FixtureRequest, qv_runner: Runner, qv_target: tuple[Case, str]) -> Result:
    """The timings of one case on one runtime, judged; skips where workers of pytest-xdist would disturb each other."""
    from qeff_validate.protocols import capabilities

    case, name = qv_target
    able = capabilities(qv_runner.runtime(name))
    if is_worker(request.config) and (able.sdk is None or able.simulated):  # a card is locked by who opens it
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
        if name in listed(request.config, "require"):
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
        if unusable and result.runtime in listed(request.config, "require"):
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
    target = target_of(item)
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


def target_of(item: pytest.Item) -> Target | None:
    """Return case and runtime of a test that uses ``qv_target``, None of another one."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "qv_target" not in parameters:
        return None
    target = parameters["qv_target"]
    return (target[0].name, target[1]) if isinstance(target, tuple) else NO_TARGET
