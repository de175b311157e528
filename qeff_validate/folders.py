# SPDX-License-Identifier: Apache-2.0
"""Folders that are about to be written, and folders that somebody else wrote."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qeff_validate.errors import ConfigError


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder that files cannot be written to, before any work is done; nothing is left behind.

    Args:
        folder: may not exist yet, nor its parents.
        name: of the option that names it, for the message.

    Raises:
        ConfigError: it is a file, cannot be created or written to, or its name is too long or holds a NUL.
    """
    try:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not parent.is_dir():
            what = "a link to nowhere" if parent.is_symlink() and not parent.exists() else "no folder"
            raise ConfigError(f"{name}: {parent} is {what}; name a directory")
        with suppress(FileNotFoundError):
            os.lstat(folder)  # the path as a whole may be too long
        longest = os.pathconf(parent, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in folder.absolute().relative_to(parent).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=parent) as probe:  # without a name, so nothing is left of a killed process
            probe.write(b"0")
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"{name}: cannot write to {str(folder)[:200]!r}: {reason}; choose another directory") from exc


def folder_entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder, relative to it, and what keeps it from being an ordinary one.

    Nothing is opened, and no link is followed. The second value is empty for a regular file.
    """
    waiting = [folder]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_symlink():
                yield path.relative_to(folder), "is a link"
            elif entry.is_dir():
                waiting.append(path)
            else:
                yield path.relative_to(folder), "" if entry.is_file() else "is no regular file"
