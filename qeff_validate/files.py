# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else wrote, read with a limit."""

from __future__ import annotations

import stat
from pathlib import Path

from qeff_validate.errors import ConfigError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_bytes(path: Path, *, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: there is none, it is of another kind (never opened: a pipe may block for ever), or it is too large.
    """
    status = path.stat()
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(f"it is {_KINDS.get(kind, 'no regular file')}, and a file is needed")
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(f"it has {max(status.st_size, len(data)):,} bytes, and at most {most_bytes:,} are read")
    return data


def expand_user(path: Path | str) -> Path:
    """Return a path with ``~`` and ``~user`` expanded.

    Raises:
        ConfigError: there is no such user, or the user has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{path}: there is no such user, or the user has no home directory") from exc


def read_lines(path: Path, *, most_bytes: int) -> list[str]:
    r"""Return the lines of a UTF-8 file: they end with ``\n`` or ``\r\n``, and with no other character.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or is no UTF-8.
    """
    text = read_bytes(path, most_bytes=most_bytes).decode("utf-8-sig")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()  # what ends with a line break has no further line
    return [line.removesuffix("\r") for line in lines]
