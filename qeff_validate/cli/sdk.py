# SPDX-License-Identifier: Apache-2.0
"""The commands ``sdk install`` and ``sdk remove``: the simulated SDK as a directory tree for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Install the simulated SDK for other software, or remove it.", no_args_is_help=True)

Prefix = Annotated[Path, typer.Argument(help="prefix of the installation; many clients require /opt/qti-aic")]


@app.command(epilog="Exit codes: 0 the tree is installed · 2 something else is there, or it cannot be written.")
def install(
    prefix: Prefix,
    python: Annotated[
        str | None, typer.Option(help="interpreter of compiler and tools (default: the one that runs this)")
    ] = None,
    old: Annotated[bool, typer.Option("--old", help="as before SDK 1.21: qaic-exec and its command line")] = False,
) -> None:
    """Install the simulated SDK at PREFIX; an earlier installation is updated, anything else there is refused."""
    from qeff_validate.sdk.install import install_tree, interpreter

    files = install_tree(prefix.absolute(), interpreter(python), old=old)
    typer.echo(f"simulated SDK: {len(files)} files at {prefix}")


@app.command(epilog="Exit codes: 0 the tree is removed · 2 there was none, or it cannot be deleted.")
def remove(prefix: Prefix) -> None:
    """Remove what 'sdk install' wrote to PREFIX; changed and foreign files stay and are listed."""
    from qeff_validate.sdk.install import remove_tree

    removed = remove_tree(prefix.absolute())
    typer.echo(f"removed {removed.files} files from {prefix}")
    for text in removed.kept:
        typer.echo(f"kept {text}")
