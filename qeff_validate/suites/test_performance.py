# SPDX-License-Identifier: Apache-2.0
"""Performance: every case with a section ``performance``, on the runtimes that its budgets hold for."""

from __future__ import annotations

import pytest

from qeff_validate.report.result import Result


@pytest.mark.perf
def test_performance(qv_timing: Result) -> None:
    """Every budget holds, as far as noise lets tell; without a budget the test is skipped."""
    assert qv_timing.status == "pass", f"{qv_timing.status}: {qv_timing.reason}"
