# SPDX-License-Identifier: Apache-2.0
"""Set-up of the project's own tests: one artifact store a session, shared by xdist workers; no network."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

STORE = "QEFF_VALIDATE_TEST_STORE"
"""Environment variable with the store of a session; a session that one of its tests starts uses it too."""

TESTS = Path(__file__).parent / "tests"

if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: threads of two torch processes that wait for each other cost many times their work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("QAIC_SIM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Build everything anew in each session, and each thing once for all workers and for sessions inside of tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["QEFF_VALIDATE_HOME"] = os.environ.setdefault(STORE, str(shared / "qv-store"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("QEFF_VALIDATE_SDK", None)
    os.environ.pop("GITHUB_ACTIONS", None)  # cases that fail on purpose are no annotations of this project


@pytest.fixture
def pytester(pytester: pytest.Pytester) -> pytest.Pytester:
    """Sessions inside of tests without the plug-in of hypothesis, which takes half of their time to be imported."""
    pytester.plugins.append("no:hypothesispytest")
    return pytester


REAL_PROCESSES = (
    "contract", "dropin", "unit/builders", "unit/runtimes", "unit/sdk", "meta/test_random_faults.py",
    "meta/test_reliability.py", "unit/test_hostile_graphs.py",
)  # fmt: skip
"""Folders and files of `tests` whose compilers and runs on the simulated card are processes from the start."""


@functools.cache
def _fork_server() -> Path:
    """Start a process that forks the simulated SDK's processes, most of whose time is spent on imports."""
    from forked_children import ForkServer, fork_children

    kept = ExitStack()
    atexit.register(kept.close)
    server = ForkServer(Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="forks-"))))
    kept.callback(server.end)
    fork_children()
    return server.path


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the simulated SDK's processes be forks, or not."""
    place = _place(item.path)
    if place and not place.startswith(REAL_PROCESSES):
        os.environ["QEFF_VALIDATE_TEST_FORKS"] = str(_fork_server())
    else:
        os.environ.pop("QEFF_VALIDATE_TEST_FORKS", None)


def _place(path: Path) -> str:
    """Return a file's place below `TESTS`, an empty text if it lies elsewhere."""
    return path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else ""


INTEGRATION = ("cluster", "contract", "dropin", "install", "meta", "plugins", "suites", "unit/pipeline", "upstream")
"""Folders of `tests` whose files are marked ``integration``, but for `UNIT`; other files mark themselves."""

UNIT = ("meta/test_faults.py", "meta/test_guards.py")
"""Files of these folders that belong to `make quick`: they show in seconds that verdicts can fail."""


def _is_integration(path: Path) -> bool:
    place = _place(path)
    return place.startswith(tuple(f"{folder}/" for folder in INTEGRATION)) and place not in UNIT


@pytest.hookimpl(tryfirst=True)  # marks must be there when ``-m`` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the folders of integration tests; begin with the longest test; leave out what needs a package index.

    The last, unless its marker is asked for.
    """
    for item in items:
        if _is_integration(item.path):
            item.add_marker("integration")
    items.sort(key=lambda item: "test_smollm2" not in item.nodeid)
    if "environments" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("environments")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
