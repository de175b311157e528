# SPDX-License-Identifier: Apache-2.0
"""The report in a notebook: one table, aligned, in the notebook's own colours."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from qeff_validate.report.result import Result
from qeff_validate.report.text import HEAD, row_cells

COLOURS: Mapping[str, str] = {
    "pass": "#2e9e5b",
    "fail": "#e0453e",
    "inconclusive": "#c98a00",
    "error": "#c053c9",
    "not_run": "#888888",
}
"""Of the statuses; each can be read on white and on black."""

NUMBERS = frozenset(HEAD[6:])
"""Columns that are aligned to the right."""

_CELL = "padding:.2em 1em .2em 0;white-space:nowrap;background:none;border:0"
"""Style of a cell. Styles stand in the elements, because notebooks remove style sheets from outputs."""

_FOLDED = (
    '<details style="margin:.2em 0"><summary>The whole report, with charts</summary>'
    '<iframe srcdoc="{page}" sandbox="allow-scripts" style="width:100%;height:40em;border:1px solid #8888"></iframe>'
    "</details>"
)
"""The page stands in a frame of its own, so that neither its styles nor its script reach the notebook."""


def notebook_table(results: Sequence[Result], closing: Iterable[str] = (), page: str = "") -> str:
    """Return the results as an HTML table, and below it what was proved, and folded the whole report with its charts.

    Args:
        results: of a report.
        closing: sentences that say what was proved.
        page: the HTML report; empty: none.
    """
    rows = [_row("th", HEAD, ["font-weight:600"] * len(HEAD))]
    for result in results:
        styles = [""] * len(HEAD)
        styles[HEAD.index("status")] = f"font-weight:600;color:{COLOURS[result.status]}"
        rows.append(_row("td", row_cells(result), styles))
    table = f'<table style="border-collapse:collapse;margin:0;color:inherit">{"".join(rows)}</table>'
    sentences = "".join(f'<div style="margin:.2em 0">{html.escape(line)}</div>' for line in closing)
    charts = _FOLDED.format(page=html.escape(page)) if page else ""
    return f'<div style="overflow-x:auto;color:inherit">{table}{sentences}{charts}</div>'


def _row(tag: str, cells: Sequence[str], styles: Sequence[str]) -> str:
    parts = []
    for name, cell, style in zip(HEAD, cells, styles, strict=True):
        side = "right" if name in NUMBERS else "left"
        parts.append(f'<{tag} style="{_CELL};text-align:{side};{style}">{html.escape(cell)}</{tag}>')
    return f'<tr style="background:none">{"".join(parts)}</tr>'
