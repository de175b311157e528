# SPDX-License-Identifier: Apache-2.0
"""When freed memory is collected, and handed back to the system."""

from __future__ import annotations

import atexit
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

WORTH_COLLECTING = 128 << 20
"""Growth of a process in bytes from which garbage is collected.

With torch and transformers in memory each collection looks at a million objects: after each export they took 17 of 108
seconds of processor time of ``tests/suites/test_bodies.py``.
"""


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


def end_without_collection() -> None:
    """Leave all memory to the system when this process ends: with torch in it Python's last collections take 1.4 s.

    For processes of this library alone: objects in cycles are not finalized.
    """
    atexit.register(gc.freeze)


def release_memory() -> None:
    """Collect garbage, and hand it back to the system, if the process has grown by `WORTH_COLLECTING`.

    Where the system does not tell, it is always collected.
    """
    resident = _resident_bytes()
    if resident is not None:
        _resident.least = min(_resident.least, resident)
    if resident is None or resident > _resident.least + WORTH_COLLECTING:
        gc.collect()
        trim_memory()
        _resident.least = _resident_bytes() or 0


_resident = SimpleNamespace(least=0)
"""The least memory in use since garbage was last collected here, in bytes, as far as it was looked at."""


def _resident_bytes() -> int | None:
    """Return the memory of this process that is in use; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def trim_memory() -> None:
    """Hand back to the system what the C library keeps of freed weights: the next copy stands beside it otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)
