# SPDX-License-Identifier: Apache-2.0
"""Model kinds without a suite of their own, also those of plug-ins: every case on every runtime, and its relations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qeff_validate.report.result import Result
from qeff_validate.suites.outcome import require_pass


@pytest.mark.plugin_kinds
def test_model_agrees_with_its_reference(qv_result: Result) -> None:
    """Outputs agree within the bounds of the runtime's precision."""
    require_pass(qv_result)


@pytest.mark.plugin_kinds
def test_model_relation(qv_relation_name: str, qv_relation: Callable[[str], Result]) -> None:
    """The same inputs, run in another way, give the same outputs."""
    require_pass(qv_relation(qv_relation_name))
