# SPDX-License-Identifier: Apache-2.0
"""Builders of artifacts, and the store that keeps them. Importing this package loads no framework."""
