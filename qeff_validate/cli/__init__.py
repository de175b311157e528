# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command line. It imports little, so that signals are handled while the commands load."""

from __future__ import annotations

import os

from qeff_validate.cli import signals


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: command line without the program's name; None: ``sys.argv``.
    """
    signals.exit_on_signals()
    # read when torch is loaded: waiting threads that spin take the processors of busy ones
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from qeff_validate.cli.app import run_command
    from qeff_validate.memory import end_without_collection

    end_without_collection()
    code = run_command(args)
    signals.exit_on_signals()  # nothing is left to clean up
    return code
