# SPDX-License-Identifier: Apache-2.0
"""`python -m qeff_validate.cli`: the same as the console script."""

import sys

from qeff_validate.cli import main

if __name__ == "__main__":
    sys.exit(main())
