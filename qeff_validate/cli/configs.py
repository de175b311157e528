# SPDX-License-Identifier: Apache-2.0
"""The commands ``list`` and ``schema``: what is in config files, and what may be."""

from __future__ import annotations

import sys

from qeff_validate.cli.options import Configs
from qeff_validate.cli.progress import console


def list_cases(configs: Configs) -> None:
    """List the cases of config files with their runtimes; a config error names its place in the file."""
    from rich.markup import escape
    from rich.table import Table

    from qeff_validate.engine import load

    table = Table("case", "model", "source", "runtimes", "options", box=None, pad_edge=False)
    for case in load(configs):
        options = ", ".join(f"{key}={value}" for key, value in case.options.items())
        cells = (case.name, case.model, case.source, ",".join(case.runtimes), options)
        table.add_row(*map(escape, cells))
    console().print(table)


def schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    from qeff_validate.cli.config_schema import config_schema

    sys.stdout.write(config_schema())
