# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else wrote, read with a limit."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError

MOST_CONFIG = 16 << 20
"""Bytes of a JSON config of a model or an adapter; real ones have kilobytes."""

_PREFIX = "qeff-validate-work-"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def regular_file(path: Path) -> os.stat_result:
    """Return the status of a regular file; links are followed, nothing is opened (a pipe may block for ever).

    Raises:
        OSError: there is no such file, or it is of another kind.
        ValueError: the name holds a NUL.
    """
    status = path.stat()
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(f"it is {_KINDS.get(kind, 'no regular file')}, and a file is needed")
    return status


def read_bytes(path: Path, *, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: there is none, it is of another kind (never opened: a pipe may block for ever), or it is too large.
    """
    status = regular_file(path)
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(f"it has {max(status.st_size, len(data)):,} bytes, and at most {most_bytes:,} are read")
    return data


def read_json(path: Path, *, most_bytes: int) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConfigError: it cannot be read, is no regular file, too large, no UTF-8, no JSON or nested too deep.
    """
    try:
        return json.loads(read_bytes(path, most_bytes=most_bytes).decode("utf-8"))
    except RecursionError:
        raise ConfigError(f"cannot read {path}: it is nested too deep") from None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"cannot read {path}: it is no UTF-8 ({exc.reason} at byte {exc.start})") from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read {path}: {reason(exc)}") from exc


def reason(exc: BaseException) -> str:
    """Return why a file cannot be read, without its name."""
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)


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


def temporary_beside(path: Path) -> Path:
    """Return a name beside a path for a file or folder that will replace it; those of dead processes are deleted."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*"):
        number = other.name.rpartition(".")[2]
        if number.isdecimal() and _is_dead(int(number)):
            _delete(other)
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder that is gone afterwards; if this process is killed, the next one that makes one deletes it.

    The folder is locked with ``flock(2)`` while its process lives.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        number = _locked(other)
        if number is not None:
            _delete(other)
            os.close(number)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        number = _locked(folder)
        if number is not None and folder.is_dir():
            break
        if number is not None:  # another process has deleted it before it was locked
            os.close(number)
    try:
        yield folder
    finally:
        _delete(folder)
        os.close(number)


def _locked(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of a folder of ours; None if somebody else holds it."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(number).st_uid == os.getuid():
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
    except OSError:
        pass
    os.close(number)
    return None


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, or no process id
        return False
    return False


def _delete(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
