# SPDX-License-Identifier: Apache-2.0
"""The commands ``qeff-validate sdk …``: the simulated SDK as a tree that other software finds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Lay down the simulated SDK for other software, or remove it.", no_args_is_help=True)

Prefix = Annotated[Path, typer.Argument(help="where the SDK is looked for; clients often insist on /opt/qti-aic")]


@app.command(epilog="Exit codes: 0 the tree is there · 2 something else is there, or it cannot be written.")
def install(
    prefix: Prefix,
    python: Annotated[
        str | None, typer.Option(help="interpreter of compiler and tools (default: the one that runs this)")
    ] = None,
    old: Annotated[bool, typer.Option("--old", help="as before SDK 1.21: qaic-exec and its old manner")] = False,
) -> None:
    """Lay the simulated SDK down at PREFIX; a tree that this made is brought up to date, all else is refused."""
    from qeff_validate.sdk import tree

    files = tree.install(prefix.absolute(), tree.interpreter(python), old=old)
    typer.echo(f"simulated SDK: {len(files)} files at {prefix}")


@app.command(epilog="Exit codes: 0 what was laid down is gone · 2 nothing was, or it cannot be deleted.")
def remove(prefix: Prefix) -> None:
    """Take away what 'sdk install' laid down at PREFIX; changed and foreign files stay and are named."""
    from qeff_validate.sdk import tree

    done = tree.remove(prefix.absolute())
    typer.echo(f"removed {done.files} files from {prefix}")
    for text in done.kept:
        typer.echo(f"kept {text}")
