# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of known size, and whether bounds would find them. Importing this package loads no framework."""
