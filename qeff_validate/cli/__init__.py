# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command line. It imports little, so that signals are heeded before the commands are loaded."""

from __future__ import annotations

from qeff_validate.cli import signals


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    signals.exit_on_signals()
    from qeff_validate.cli.commands import run_command

    code = run_command(args)
    signals.exit_on_signals()  # nothing is held any more
    return code
