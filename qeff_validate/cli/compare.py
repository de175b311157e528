# SPDX-License-Identifier: Apache-2.0
"""The command ``compare``: what changed from one report to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qeff_validate.cli.progress import print_text

EPILOG = "Exit codes: 0 no new failure · 1 a result fails now and did not before · 2 a file cannot be read."


def compare(
    old: Annotated[Path, typer.Argument(help="report.json of the earlier run, or its directory", metavar="OLD")],
    new: Annotated[Path, typer.Argument(help="of the later run", metavar="NEW")],
    html: Annotated[Path | None, typer.Option(help="also write the comparison as an HTML page to this file")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print the comparison as JSON alone")] = False,
) -> None:
    """Compare two reports: what became worse or better, what is new, and what is gone.

    Example: [bold]qeff-validate compare main/report.json qv-report --html changes.html[/]
    """
    from qeff_validate.report.compare import compare_reports, html_comparison
    from qeff_validate.report.report import read_report
    from qeff_validate.report.writers import write_texts

    comparison = compare_reports(read_report(old), read_report(new))
    if html is not None:
        write_texts(html.parent, {html.name: html_comparison(comparison, (str(old), str(new)))})
    if json_output:
        print_text(json.dumps(comparison.plain(), ensure_ascii=False, allow_nan=False, indent=1))
    else:
        for line in comparison.lines():
            print_text(line)
        if html is not None:
            print_text(f"comparison: {html}")
    raise typer.Exit(comparison.exit_code())
