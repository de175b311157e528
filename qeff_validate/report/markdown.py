# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown, for a GitHub step summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qeff_validate.report.text import HEAD, closing, problems, row_cells
from qeff_validate.report.timings import HEAD as TIMING_HEAD
from qeff_validate.report.timings import timing_lines, timing_rows


def markdown(plain: Mapping[str, Any]) -> str:
    """Return the report for a GitHub step summary."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [line(row_cells(result)) for result in plain["results"]]
    parts = ["# qeff_validate", "", line(HEAD), line("---" for _ in HEAD), *rows, ""]
    timed = list(timing_rows(plain["results"]))
    if timed:
        parts += ["## Timings", "", line(TIMING_HEAD), line("---" for _ in TIMING_HEAD), *map(line, timed), ""]
        parts += [*(f"- {text}" for text in timing_lines(plain["results"])), ""]
    found = problems(plain)
    if found:
        parts += ["## What did not pass, findings and notes", ""]
        parts += [f"- {text.splitlines()[0]}" + "".join(f"\n  {x}" for x in text.splitlines()[1:]) for text in found]
        parts.append("")
    parts += [*(f"{text}\n" for text in closing(plain))]
    return "\n".join(parts)
