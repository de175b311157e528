# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown, for a GitHub step summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qeff_validate.report.result import Result
from qeff_validate.report.text import HEAD, closing, problems, row_cells
from qeff_validate.report.timings import HEAD as TIMING_HEAD
from qeff_validate.report.timings import timing_lines, timing_rows


def markdown(results: Sequence[Result], unwritten: Sequence[str] = ()) -> str:
    """Return results, and why recordings could not be written, for a GitHub step summary."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [line(row_cells(result)) for result in results]
    parts = ["# qeff_validate", "", line(HEAD), line("---" for _ in HEAD), *rows, ""]
    timed = list(timing_rows(results))
    if timed:
        parts += ["## Timings", "", line(TIMING_HEAD), line("---" for _ in TIMING_HEAD), *map(line, timed), ""]
        parts += [*(f"- {text}" for text in timing_lines(results)), ""]
    texts = [*problems(results), *unwritten]
    if texts:
        parts += ["## What did not pass, findings and notes", ""]
        parts += [f"- {text.splitlines()[0]}" + "".join(f"\n  {x}" for x in text.splitlines()[1:]) for text in texts]
        parts.append("")
    parts += [*(f"{text}\n" for text in closing(results))]
    return "\n".join(parts)
