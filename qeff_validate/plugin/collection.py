# SPDX-License-Identifier: Apache-2.0
"""Which tests there are: the suites, for each case and runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qeff_validate.plugin.options import MARKERS, configs, listed, option
from qeff_validate.registry import is_built_in, registered

if TYPE_CHECKING:
    from qeff_validate.config.case import Case


KIND_MARKS = frozenset(MARKERS) - {"ai100", "sim", "ort", "torch", "slow", "perf"}
"""Marks by which a test takes the cases of one model kind; a test with none of them takes all cases."""

SUITES = frozenset({"embedding", "peft"})
"""Marks of the suites that are made for one kind; `GENERIC_SUITE` takes the cases of all other kinds."""

SUITE_FOLDER = Path(__file__).parents[1] / "suites"

GENERIC_SUITE = SUITE_FOLDER / "test_models.py"

TIMING_SUITE = GENERIC_SUITE.with_name("test_performance.py")
"""Takes the cases of every kind that have a section ``performance``."""

CARD = "ai100"
"""The runtime that is also collected for cases that do not name it, if ``-m`` or ``--qv-require`` asks for it."""

_CASES: pytest.StashKey[Any] = pytest.StashKey()


def plugin_markers() -> dict[str, str]:
    """Return a marker for each registered runtime, and for the suite of each model kind of a plug-in."""
    markers = {name: f"runs on {name}" for name in registered("runtimes")}
    for entry in registered("models").values():
        if not is_built_in(entry):  # nothing of ours is loaded for unrelated tests
            with suppress(Exception):  # a plug-in that cannot be imported is told where a case names it
                markers[entry.load().suite] = f"validates a model of the kind {entry.name}"
    return markers


def cases_of(config: pytest.Config) -> Sequence[Case]:
    """Return the cases of a session, read once."""
    from qeff_validate.engine import case_for, load
    from qeff_validate.errors import ConfigError, suggest

    if _CASES not in config.stash:
        try:
            source = option(config, "model")
            config.stash[_CASES] = [case_for(source)] if source else load(configs(config))
        except ConfigError as exc:
            raise pytest.UsageError(str(exc)) from exc
        for name in listed(config, "runtimes") + listed(config, "require"):
            if name not in registered("runtimes"):
                raise pytest.UsageError(f"no runtime is called {name!r}.{suggest(name, registered('runtimes'))}")
        check_marks(config)
    cases: Sequence[Case] = config.stash[_CASES]
    return cases


def check_marks(config: pytest.Config) -> None:
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
            if mark not in known and strict_markers(config):
                raise pytest.UsageError(
                    f"{place} is not registered, and --strict-markers is on.{suggest(mark, known)} Or add it to"
                    " markers in the ini file"
                )


def strict_markers(config: pytest.Config) -> bool:
    """Return whether unknown markers are refused."""
    if getattr(config.option, "strict_markers", False):  # before pytest 9
        return True
    for name in ("strict_markers", "strict"):
        with suppress(KeyError, ValueError):
            value = config.getini(name)
            if value is not None:
                return bool(value)
    return False


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Give a suite of ours an id that can be pasted after ``--pyargs``, wherever this package is installed."""
    if module_path.parent != SUITE_FOLDER:
        return None
    module: pytest.Module = pytest.Module.from_parent(
        parent, path=module_path, nodeid=f"qeff_validate.suites.{module_path.stem}"
    )
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize suites over case × runtime."""
    if "qv_target" not in metafunc.fixturenames:
        return
    from qeff_validate.protocols import model_kind

    if "qv_timing" in metafunc.fixturenames:
        chosen = listed(metafunc.config, "runtimes")
        metafunc.parametrize("qv_target", [*timing_params(cases_of(metafunc.config), chosen)])
        return
    suites = {mark.name for mark in metafunc.definition.iter_markers()}
    of_all_kinds = not suites & {*KIND_MARKS, *(model_kind(case).suite for case in cases_of(metafunc.config))}
    by_relation = "qv_relation_name" in metafunc.fixturenames
    params = []
    for case in cases_of(metafunc.config):
        kind = model_kind(case)
        generic = "plugin_kinds" in suites and kind.suite not in SUITES
        if not (of_all_kinds or generic or kind.suite in suites):
            continue
        for name in runtimes_of(metafunc.config, case):
            marks = [getattr(pytest.mark, mark) for mark in dict.fromkeys((name, kind.suite, *case.marks))]
            target, test = (case, name), f"{case.name}-{name}"
            if by_relation:
                params += [
                    pytest.param(target, relation, id=f"{test}-{relation}", marks=marks) for relation in kind.relations
                ]
            else:
                params.append(pytest.param(target, id=test, marks=marks))
    metafunc.parametrize("qv_target, qv_relation_name" if by_relation else "qv_target", params)


def timing_params(cases: Sequence[Case], chosen: Sequence[str]) -> Iterator[Any]:
    """Yield the parameters of the timing suite, one for each case and runtime."""
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
        return None if any(True for _ in timing_params(cases_of(config), listed(config, "runtimes"))) else True
    if collection_path != GENERIC_SUITE:
        return None
    from qeff_validate.protocols import model_kind

    return None if any(model_kind(case).suite not in SUITES for case in cases_of(config)) else True


def runtimes_of(config: pytest.Config, case: Case) -> list[str]:
    """Return the runtimes of ``--qv-runtimes``, else of the case; the card too, if it is asked for by name.

    ``-m ai100`` finds tests with any config, so a host with a card needs no config of its own; without it no test is
    collected that is skipped on every other host.
    """
    chosen = listed(config, "runtimes")
    if chosen:
        return list(dict.fromkeys(chosen))
    card = CARD in listed(config, "require") or re.search(rf"\b{CARD}\b", config.option.markexpr or "")
    return list(dict.fromkeys([*case.runtimes, *([CARD] if card else [])]))
