# SPDX-License-Identifier: Apache-2.0
"""Performance: every case with a section ``performance``, on the runtimes that its budgets hold for."""

from __future__ import annotations

import pytest

from qeff_validate.report.result import Result
from qeff_validate.suites.outcome import require_pass


@pytest.mark.perf
def test_performance(qv_timing: Result) -> None:
    """Every budget holds, as far as noise lets tell; without a budget the test is skipped."""
    require_pass(qv_timing)
