# SPDX-License-Identifier: Apache-2.0
"""Metrics, bounds and verdicts: numpy alone, in float64. Importing this package loads no framework."""
