# SPDX-License-Identifier: Apache-2.0
"""Reporters: functions that hand a report to another system, chosen by name; entry points of their own group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qeff_validate.errors import ValidateError
from qeff_validate.registry import load_entry

if TYPE_CHECKING:
    from qeff_validate.report.report import Report

Reporter = Callable[["Report"], None]
"""Sends a report; raises if it did not arrive."""


def load_reporters(names: Sequence[str]) -> dict[str, Reporter]:
    """Return the reporters of these names, entry points of the group ``qeff_validate.reporters``.

    Raises:
        ConfigError: no reporter has such a name.
        MissingPackage: what a reporter needs is an extra that is not installed.
    """
    return {name: load_entry("reporters", name) for name in names}


def send_report(report: Report, reporters: Mapping[str, Reporter]) -> None:
    """Hand a report to each reporter; one that fails keeps none of the others from it.

    Raises:
        ValidateError: a reporter failed; no verdict is lost by it.
    """
    problems = []
    for name, reporter in reporters.items():
        try:
            reporter(report)
        except Exception as exc:  # another system's failure must lose no verdict
            kind = "" if isinstance(exc, ValidateError) else f"{type(exc).__name__}: "
            problems.append(f"the reporter {name!r} failed: {kind}{exc}")
    if problems:
        raise ValidateError("; ".join(problems))
