# SPDX-License-Identifier: Apache-2.0
"""Hands freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Collect garbage, and hand it back to the system."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Hand back to the system what the C library keeps of freed weights: the next copy stands beside it otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)
