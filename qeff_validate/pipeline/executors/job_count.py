# SPDX-License-Identifier: Apache-2.0
"""How many processes a run is asked to use."""

from __future__ import annotations

import os

from qeff_validate.errors import ConfigError

MOST_JOBS = 1024
"""Processes that a run may start."""


def job_count(text: str, option: str = "--jobs") -> int:
    """Parse ``--jobs``: a number, or ``auto`` for the number of processors.

    Args:
        text: its value.
        option: its name.

    Raises:
        ConfigError: it is neither.
    """
    if text == "auto":
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST_JOBS:
        raise ConfigError(f"{option}: {text[:40]!r} is no number of processes: give 1 to {MOST_JOBS}, or auto")
    return int(text)
