# SPDX-License-Identifier: Apache-2.0
"""The model kind ``multi-vector``: ColBERT. Importing this package loads no framework."""
