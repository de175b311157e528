# SPDX-License-Identifier: Apache-2.0
"""One report of several: those of the shards of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.report.report import Report, read_report


def merged(paths: Sequence[Path]) -> Report:
    """Return one report with the results of several, in their order.

    Args:
        paths: files ``report.json``, or folders that hold one.

    Raises:
        ConfigError: a file is no report, or two reports have a result of the same case on the same runtime.
    """
    reports = {path: read_report(path) for path in paths}
    origin: dict[tuple[str, str, str | None], Path] = {}
    for path, report in reports.items():
        for result in report.results:
            place = result.case, result.runtime, result.stage if result.reference == "itself" else None
            other = origin.setdefault(place, path)
            if other != path:
                raise ConfigError(
                    f"both {other} and {path} have a result of {result.case}-{result.runtime}: one of them is from"
                    " another run; merge the reports of the shards of one"
                )
    environments = [dict(report.environment) for report in reports.values()]
    return Report(
        tuple(result for report in reports.values() for result in report.results),
        _common(environments),
        tuple(dict.fromkeys(text for report in reports.values() for text in report.unwritten)),
    )


def _common(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all environments say; where they differ, what each says."""
    names = dict.fromkeys(name for environment in environments for name in environment)
    common: dict[str, Any] = {}
    for name in names:
        values = [environment.get(name) for environment in environments]
        common[name] = values[0] if all(value == values[0] for value in values) else {"differs": values}
    return common
