# SPDX-License-Identifier: Apache-2.0
"""The model kind ``sparse-embedding``: SPLADE. Importing this package loads no framework."""
