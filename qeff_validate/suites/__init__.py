# SPDX-License-Identifier: Apache-2.0
"""The product's suites: ``pytest --qv-config my.yaml --pyargs qeff_validate.suites``."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `cli.main`; read when torch is loaded
