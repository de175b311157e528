# SPDX-License-Identifier: Apache-2.0
"""The model kind ``embedding``: a pooled body. Importing this package loads no framework."""
