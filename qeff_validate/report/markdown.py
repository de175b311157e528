# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown, for a GitHub step summary."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qeff_validate.report.result import Result
from qeff_validate.report.text import (
    HEAD,
    closing,
    distinct_problems,
    flat,
    remarks,
    row_cells,
    status_word,
)
from qeff_validate.report.timings import HEAD as TIMING_HEAD
from qeff_validate.report.timings import timing_lines, timing_rows


def markdown_lines(
    results: Sequence[Result], unwritten: Sequence[str] = (), environment: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Yield the lines of a report for a GitHub step summary; what is long is folded.

    Args:
        results: of the report.
        unwritten: why recordings could not be written.
        environment: of the report.
    """
    yield from ("# qeff_validate", "", _line(HEAD), _line("---" for _ in HEAD))
    for result in results:
        yield _line(row_cells(result))
    yield ""
    timed = list(timing_rows(results))
    if timed:
        yield from ("## Timings", "", _line(TIMING_HEAD), _line("---" for _ in TIMING_HEAD), *map(_line, timed), "")
        yield from (*(f"- {_text(text)}" for text in timing_lines(results)), "")
    if unwritten or any(result.status != "pass" for result in results):
        yield from ("## What did not pass", "", *(f"- {_text(text)}" for text in unwritten), "")
        for result, runtimes in distinct_problems(results):
            yield from _problem(result, runtimes)
    told = remarks(results)
    if told:
        yield from _folded(f"Findings and notes ({len(told)})", [f"- {_text(text)}" for text in told])
    if environment:
        table = [_line(("what", "value")), _line(("---", "---")), *map(_line, flat(environment))]
        yield from _folded("Environment", table)
    for text in closing(results):
        yield f"{_text(text)}\n"


def _problem(result: Result, runtimes: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a result that did not pass: where and what, folded open, and why."""
    stage = f" at {result.stage}" if result.stage else ""
    expected = " (expected)" if result.expected else ""
    names = ", ".join(f"{result.case}-{runtime}" for runtime in runtimes)
    title = f"<b>{_text(names)}</b>: {status_word(result)}{expected} ({result.status}{stage})"
    lines = [_text(result.reason) or "No reason was given."]
    if result.expected:
        lines += ["", f"Expected: {_text(result.expected)}"]
    if result.explanation:
        lines += ["", f"**Where it comes from:** {_text(result.explanation.summary)}"]
    yield from _folded(title, lines, opened=result.status == "fail" and not result.expected)


def _folded(title: str, lines: Iterable[str], *, opened: bool = False) -> list[str]:
    """Return lines in a ``<details>`` block; ``title`` is HTML."""
    return [f"<details{' open' * opened}><summary>{title}</summary>", "", *lines, "", "</details>", ""]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_text(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _text(text: str) -> str:
    """Return text that opens or closes no HTML element; its further lines are indented, as in a list."""
    return html.escape(text, quote=False).replace("\n", "\n  ")
