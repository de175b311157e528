# SPDX-License-Identifier: Apache-2.0
"""The product's suites: ``pytest --qv-config my.yaml --pyargs qeff_validate.suites``."""
