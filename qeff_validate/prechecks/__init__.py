# SPDX-License-Identifier: Apache-2.0
"""Comparisons before any numeric one: of a session's inputs, and of the provenance of artifacts. Loads no framework."""
