# SPDX-License-Identifier: Apache-2.0
"""Known failures of a case, which expire."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

from qeff_validate.config.case import Case
from qeff_validate.report.result import Result


def with_expectation(case: Case, result: Result, today: date | None = None) -> Result:
    """Mark a result that the case expects; turn an unexpected pass, and an expired expectation, into a failure."""
    expect = next((item for item in case.expect if item.runtime == result.runtime), None)
    if expect is None or result.status == "not_run":
        return result
    if result.status == "pass":
        reason = f"passed, but the case expects {expect.status} ({expect.reason}): take the expectation out"
        return replace(result, status="fail", stage="expect", reason=reason)
    if result.status != expect.status:
        return result
    if (today or date.today()) > expect.until:
        expired = f"the known failure ({expect.reason}) was accepted until {expect.until} only; {result.reason}"
        return replace(result, reason=expired)
    return replace(result, expected=f"{expect.reason}, until {expect.until}")
