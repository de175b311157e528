# SPDX-License-Identifier: Apache-2.0
"""What the simulated compiler and container raise; the front ends turn it into exit codes and statuses."""

from __future__ import annotations


class CompileError(Exception):
    """The compiler refuses: the text goes to stderr and the exit code is 255 (qaic-contract §6.6)."""


class QpcError(Exception):
    """A QPC can not be read: the text says whether it is missing, real, foreign or damaged."""
