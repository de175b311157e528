# SPDX-License-Identifier: Apache-2.0
"""Which files a piece of work opens: Python's own opens by an audit hook, those of native code by inotify."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

IN_OPEN, IN_ISDIR = 0x20, 0x40000000

_opened_by_python: set[str] = set()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened_by_python.add(os.fsdecode(arguments[0]))


@cache
def _add_hook() -> None:
    sys.addaudithook(_hook)


@contextmanager
def opened_below(root: Path) -> Iterator[set[Path]]:
    """Collect the files below a directory that are opened, by this process (Python) or by any (native code).

    Links are resolved: the file that a link points to is what is opened. An audit hook cannot be taken away, so this is
    for processes of their own. The set is filled when the context ends.
    """
    _add_hook()
    root = root.resolve()
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    assert handle >= 0, os.strerror(ctypes.get_errno())
    folders = {}
    for folder, _, _ in os.walk(root):
        watch = libc.inotify_add_watch(handle, os.fsencode(folder), IN_OPEN)
        assert watch >= 0, os.strerror(ctypes.get_errno())
        folders[watch] = Path(folder)
    _opened_by_python.clear()
    opened: set[Path] = set()
    try:
        yield opened
        paths = [Path(name).resolve() for name in _opened_by_python]
        opened.update(path for path in paths if path.is_relative_to(root) and not path.is_dir())
        opened.update(_events(handle, folders))
    finally:
        os.close(handle)


def _events(handle: int, folders: dict[int, Path]) -> Iterator[Path]:
    while True:
        try:
            data = os.read(handle, 1 << 16)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0")
            at += 16 + length
            if name and not mask & IN_ISDIR:
                yield (folders[watch] / os.fsdecode(name)).resolve()
