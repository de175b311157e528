# SPDX-License-Identifier: Apache-2.0
"""Annotations of GitHub Actions: each failing case is shown at its line of the config, in the pull request."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from qeff_validate.report.result import Result
from qeff_validate.report.text import runtime_name, status_word, unsettled_places

Places = Mapping[str, tuple[Path, int]]
"""File and line of each case, by its name."""


def on_github() -> bool:
    """Return True in a job of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def github_annotations(
    results: Sequence[Result], places: Places, *, require: Collection[str] = (), allow_inconclusive: bool = False
) -> Iterator[str]:
    """Yield a workflow command for each result that fails a run, and a notice for each known failure.

    Args:
        results: of a report.
        places: file and line of the cases; others get no place.
        require: runtimes whose ``not_run`` fails a run.
        allow_inconclusive: inconclusive results do not fail the run: they get a notice.
    """
    unsettled = unsettled_places(results)
    for result in results:
        if result.status == "pass" or (result.status == "not_run" and result.runtime not in require):
            continue
        known = result.expected is not None or (result.status == "inconclusive" and allow_inconclusive)
        properties = {"title": f"{result.case} on {runtime_name(result)}: {status_word(result, unsettled)}"}
        if result.case in places:
            file, line = places[result.case]
            properties = {"file": _relative(file), "line": str(line), **properties}
        listed = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
        summary = result.explanation.summary if result.explanation else ""
        text = "\n".join(filter(None, (summary, result.reason, result.expected))) or result.status
        yield f"::{'notice' if known else 'error'} {listed}::{_data(text)}"


def _relative(file: Path) -> str:
    """Return a path as GitHub knows it: from the root of the checkout."""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or ".").resolve()
    path = file.resolve()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
