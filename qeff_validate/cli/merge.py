# SPDX-License-Identifier: Apache-2.0
"""The command ``merge``: one report of those of the shards of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qeff_validate.cli.options import EPILOG, required_runtimes

__all__ = ["EPILOG", "merge"]


def merge(
    reports: Annotated[
        list[Path], typer.Argument(help="report.json of each shard, or its directory", metavar="REPORT…")
    ],
    report: Annotated[Path, typer.Option(help="directory for report.html, .json and .md of all")],
    require: Annotated[str, typer.Option(help="runtimes that must have run; 'not run' is then an error")] = "",
    allow_inconclusive: Annotated[
        bool, typer.Option("--allow-inconclusive", help="inconclusive results do not fail")
    ] = False,
) -> None:
    """Make one report of those of the shards of a run; the exit code is that of the whole run.

    Example: [bold]qeff-validate merge shard-1 shard-2 shard-3 --report qv-report[/]
    """
    from qeff_validate.cli.run import print_closing, print_results
    from qeff_validate.folders import check_writable
    from qeff_validate.report.merge import merged

    required = required_runtimes(require)
    check_writable(report, "--report")
    made = merged(reports)
    made.write(report)
    print_results(made)
    print_closing(made, report)
    raise typer.Exit(made.exit_code(require=required, allow_inconclusive=allow_inconclusive))
