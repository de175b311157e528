# SPDX-License-Identifier: Apache-2.0
"""When freed memory is collected, and handed back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector, for work that allocates millions of objects that stay alive: an import, an export.

    It takes an eighth of the time in which torch and transformers are imported. The export of SmolLM2 takes 48.8 s of
    processor time with collections, 41.6 s without, and 6 % more memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
