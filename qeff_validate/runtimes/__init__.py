# SPDX-License-Identifier: Apache-2.0
"""Runtime adapters. Importing this package loads no framework."""
