# SPDX-License-Identifier: Apache-2.0
"""Locks on files of the store: they end with their process, and their files are deleted when they are released.

``flock(2)`` on a file that the holder deletes. A process that was waiting for the deleted file notices that the path
now names another file, or none, and tries again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path


class FileLock:
    """An exclusive lock that is held; `close` releases it and deletes its file.

    Attributes:
        path: the locked file.
        number: its file descriptor.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number

    def close(self) -> None:
        """Delete the file and release the lock; closing twice does nothing."""
        if self.number >= 0:
            number, self.number = self.number, -1
            try:
                self.path.unlink(missing_ok=True)
            finally:
                os.close(number)


def try_lock(path: Path) -> FileLock | None:
    """Return the lock on a path, or None if another process holds it.

    Raises:
        OSError: the file cannot be created or locked.
    """
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock(path: Path, waiting: Callable[[], None] = lambda: None) -> FileLock:
    """Return the lock on a path, as soon as no other process holds it.

    Args:
        path: the file to lock; it is created if it does not exist.
        waiting: called once if another process holds the lock.

    Raises:
        OSError: the file cannot be created or locked.
    """
    acquired = try_lock(path)
    if acquired is None:
        waiting()
        acquired = _lock(path, fcntl.LOCK_EX)
    assert acquired is not None
    return acquired


def remove(path: Path) -> None:
    """Delete a file, a link (not its target), a directory or anything else at a path; nothing may be there.

    Raises:
        OSError: it cannot be deleted.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock(path: Path, operation: int) -> FileLock | None:
    while True:
        if os.path.lexists(path) and not _is_file(path):
            remove(path)
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(number, operation)
            if os.path.samestat(os.fstat(number), path.lstat()):
                return FileLock(path, number)
        except BlockingIOError:
            os.close(number)
            return None
        except FileNotFoundError:
            pass  # its holder has deleted it
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True
