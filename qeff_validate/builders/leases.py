# SPDX-License-Identifier: Apache-2.0
"""Leases: which entries of a store the processes that have it open may still read.

Each open store has one locked file in ``<root>/leases/``, named after its process, which lists the entries that it has
returned. The lock ends with the process, so the lease of a killed process is recognized and deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
import weakref
from pathlib import Path

from qeff_validate.builders.file_locks import FileLock, lock, try_lock

_LEASE = re.compile(r"[0-9]+-[0-9a-f]{32}")
"""Name of a lease: process id and a random number."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Leases:
    """The leases of a store, and the lease of this process.

    Args:
        folder: the directory of the leases; it is created with the first lease.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lease: FileLock | None = None

    @property
    def is_open(self) -> bool:
        """True if this process has a lease."""
        return self._lease is not None

    def add(self, name: str) -> None:
        """Write the name of an entry into the lease of this process; the caller holds the lock on the entry.

        Raises:
            OSError: the lease cannot be written. A full disk is no error: existing entries can still be read.
        """
        if self._lease is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lease = lock(self.folder / f"{os.getpid()}-{uuid.uuid4().hex}")
            weakref.finalize(self, _release, self._lease)
        try:
            os.write(self._lease.number, f"{name}\n".encode())
        except OSError as exc:
            if exc.errno not in DISK_FULL:
                raise

    def others(self) -> set[str]:
        """Return the names of the entries in the leases of other stores."""
        names: set[str] = set()
        for path in self._other_paths():
            with contextlib.suppress(FileNotFoundError):
                names.update(path.read_text(encoding="ascii").split())
        return names

    def sweep(self) -> None:
        """Delete the leases of processes that ended without deleting them."""
        for path in self._other_paths():
            lease = try_lock(path)
            if lease is not None:
                lease.close()

    def _other_paths(self) -> list[Path]:
        own_path = None if self._lease is None else self._lease.path
        return [path for path in self.folder.glob("*") if path != own_path and _LEASE.fullmatch(path.name)]


def _release(lease: FileLock) -> None:
    if lease.path.name.startswith(f"{os.getpid()}-"):  # a forked process has a copy and must not delete the file
        with contextlib.suppress(OSError):  # the directory may no longer exist
            lease.close()
