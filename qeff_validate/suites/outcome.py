# SPDX-License-Identifier: Apache-2.0
"""How a test of the suites fails: with the finding alone, not with a traceback and the repr of a result."""

from __future__ import annotations

import pytest

from qeff_validate.report.result import Result
from qeff_validate.report.text import listed_reason


def require_pass(result: Result) -> None:
    """Fail the test that runs unless a result is a pass.

    Args:
        result: of `qv_result`, `qv_relation` or `qv_timing`.

    Raises:
        pytest.fail.Exception: status, stage, reason, where it comes from, and findings, one a line.

    Examples:
        >>> require_pass(Result("small", "ort", "pass", planned=3, compared=3))
        >>> require_pass(Result("small", "ort", "fail", reason="rel_l2 0.5 at row 2", findings=("row 2 is empty",)))
        Traceback (most recent call last):
        Failed: small-ort: fail: rel_l2 0.5 at row 2
        finding: row 2 is empty
    """
    if result.status == "pass":
        return
    stage = f" at {result.stage}" if result.stage else ""
    lines = [f"{result.case}-{result.runtime}: {result.status}{stage}: {listed_reason(result)}"]
    if result.explanation is not None:
        lines.append(f"where: {result.explanation.summary}")
    lines += [f"finding: {finding}" for finding in result.findings]
    lines += [f"note: {note}" for note in result.notes]
    pytest.fail("\n".join(lines), pytrace=False)
