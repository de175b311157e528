# SPDX-License-Identifier: Apache-2.0
"""Runs the compiler: `python -m qeff_validate.sdk.simulated.compiler <flags>`."""

import sys

from .qaic_compile import main

if __name__ == "__main__":
    sys.exit(main())
