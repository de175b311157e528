# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaic-exec`, the compiler's command before SDK 1.21 (card-contract §1.2).

Its hardware version is 2.0, and without `-compile-only` it would run the program after compilation. The features of the
compiler depend on the SDK's version, see `release`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import qaic_compile

_STOPS = ("-h", "-usage", "-version", "-operators-supported", "-dump-custom-IO-config-template")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the compiler and return its exit code: 0, or 255 for every failure.

    Args:
        argv: command line without the program's name; None: ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = {argument.partition("=")[0] for argument in arguments}
    if not names & {"-compile-only", *_STOPS}:
        print("Running a program after compiling it is not simulated: add -compile-only", file=sys.stderr)
        return 255
    versions = [argument for argument in arguments if argument.startswith("-aic-hw-version=")]
    if unknown := [version for version in versions if version != "-aic-hw-version=2.0"]:
        print(f"Option {unknown[0]} is not known to qaic-exec; use -aic-hw-version=2.0", file=sys.stderr)
        return 255
    return qaic_compile.main(arguments)
