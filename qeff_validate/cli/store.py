# SPDX-License-Identifier: Apache-2.0
"""The commands ``store list`` and ``store prune``."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.cli.options import StoreDir
from qeff_validate.cli.progress import console, print_text
from qeff_validate.errors import ConfigError

if TYPE_CHECKING:
    from qeff_validate.builders.store import EntryInfo

SECONDS_PER_DAY = 86400

app = typer.Typer(help="List or prune the artifact store.", no_args_is_help=True)


@app.command("list")
def list_entries(store: StoreDir = None) -> None:
    """List the entries of the store: kind, size, days since last use, directory."""
    from qeff_validate.builders.store import Store

    entries = Store(store).entries()
    for entry in entries:
        print_text(_row(entry))
    total = sum(entry.size for entry in entries) / 1e6
    console().print(f"{len(entries)} entries, {total:.1f} MB in {Store(store).root}", markup=False, soft_wrap=True)


@app.command("prune")
def prune(
    days: Annotated[
        float, typer.Option(min=0, help="delete entries that were not used for this many days; 0: everything")
    ],
    store: StoreDir = None,
) -> None:
    """Delete entries that were not used for some days; a later run rebuilds what it needs."""
    from qeff_validate.builders.store import Store

    if not math.isfinite(days):
        raise ConfigError(f"--days: {days} is no number of days")
    deleted = Store(store).prune(unused_since=time.time() - days * SECONDS_PER_DAY)
    for entry in deleted:
        print_text(_row(entry))
    megabytes = sum(entry.size for entry in deleted) / 1e6
    console().print(f"deleted {len(deleted)} entries, {megabytes:.1f} MB", markup=False, highlight=False)


def _row(entry: EntryInfo) -> str:
    days = (time.time() - entry.used) / SECONDS_PER_DAY
    return f"{entry.kind:10} {entry.size / 1e6:10.1f} MB {days:8.1f} days  {entry.path}"
