# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: hooks in `options`, `collection` and `session`, fixtures in `fixtures`. Loads no framework."""

from __future__ import annotations

import pytest

from qeff_validate.plugin.collection import (
    pytest_generate_tests,
    pytest_ignore_collect,
    pytest_pycollect_makemodule,
)
from qeff_validate.plugin.fixtures import (
    _qv_awaited,
    pytest_runtest_makereport,
    qv_adapters,
    qv_relation,
    qv_result,
    qv_runner,
    qv_session,
    qv_timing,
)
from qeff_validate.plugin.options import MARKERS, OPTIONS, pytest_addoption
from qeff_validate.plugin.session import (
    pytest_collection,
    pytest_configure,
    pytest_report_header,
    pytest_runtestloop,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_xdist_node_collection_finished,
)

__all__ = [
    "MARKERS",
    "OPTIONS",
    "_qv_awaited",
    "pytest_addoption",
    "pytest_collection",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_ignore_collect",
    "pytest_pycollect_makemodule",
    "pytest_report_header",
    "pytest_runtest_makereport",
    "pytest_runtestloop",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_xdist_node_collection_finished",
    "qv_adapters",
    "qv_relation",
    "qv_result",
    "qv_runner",
    "qv_session",
    "qv_timing",
]

pytest.register_assert_rewrite("qeff_validate.suites")
