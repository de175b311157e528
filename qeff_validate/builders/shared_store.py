# SPDX-License-Identifier: Apache-2.0
"""A store behind an fsspec URL, through which hosts without a shared directory hand on what they build.

Layout: ``<url>/<kind>/<key>/<digest>/`` holds the files of an entry, and ``<url>/<kind>/<key>/provenance.json``, which
is written last, names them; so an entry is complete or not there, and of two hosts that wrote it at once one wins. What
arrives is verified like any other entry of a store.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from qeff_validate.errors import BuildError, ConfigError, MissingPackage, naming_extras

PROVENANCE = "provenance.json"
"""Name of the file that lists the files of an entry."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the file system that another disk would not have."""


class SharedStore:
    """Entries at a URL.

    Args:
        url: of a directory, such as ``s3://bucket/store`` or ``file:///mnt/store``, with any protocol of fsspec.

    Raises:
        MissingPackage: fsspec, or its package for the protocol, is not installed.
        ConfigError: fsspec does not know the protocol.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with naming_extras():
            import fsspec
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except ImportError as exc:  # such as "Install s3fs to access S3"
            raise MissingPackage(f"--store {url}: {exc}") from exc
        except ValueError as exc:
            raise ConfigError(f"--store {url}: {exc}") from exc
        self._root = PurePosixPath(root)

    def has(self, kind: str, key: str) -> bool:
        """Return whether there is an entry.

        Raises:
            BuildError: the URL cannot be read.
        """
        with self._translated("read"):
            return bool(self._files.exists(str(self._root / kind / key / PROVENANCE)))

    def fetch(self, kind: str, key: str, folder: Path) -> bool:
        """Copy an entry into an empty directory; return False if there is none.

        Args:
            kind: of the entry.
            key: name of the entry.
            folder: takes its files and its ``provenance.json``; what a damaged entry left there is not verified.

        Raises:
            BuildError: the URL cannot be read.
            OSError: this host's disk is full.
        """
        place = self._root / kind / key
        with self._translated("read"):
            try:
                written = self._files.cat_file(str(place / PROVENANCE))
            except FileNotFoundError:
                return False
            named = _files_and_digest(written)
            if named is None:
                return False
            names, digest = named
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._files.get_file(str(place / digest / name), str(folder / name))
                except FileNotFoundError:
                    return False
            (folder / PROVENANCE).write_bytes(written)
        return True

    def keep(self, kind: str, key: str, folder: Path, digest: str) -> None:
        """Copy an entry to the URL.

        Args:
            kind: of the entry.
            key: name of the entry.
            folder: its directory.
            digest: of its files, without ``provenance.json``.

        Raises:
            BuildError: the URL cannot be written.
        """
        place = self._root / kind / key
        with self._translated("write"):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            for path in files:
                name = path.relative_to(folder)
                if name.as_posix() != PROVENANCE:
                    target = place / digest / name.as_posix()
                    self._files.makedirs(str(target.parent), exist_ok=True)
                    self._files.put_file(str(path), str(target))
            self._files.pipe_file(str(place / PROVENANCE), (folder / PROVENANCE).read_bytes())

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Raise a BuildError instead of whatever a file system of fsspec raises, but for a full disk of this host."""
        try:
            yield
        except Exception as exc:
            if doing == "read" and getattr(exc, "errno", None) in FULL:
                raise
            raise BuildError(
                f"cannot {doing} the store {self.url}: {type(exc).__name__}: {exc}. Look at its address and"
                " permissions, or choose a directory with --store DIR"
            ) from exc


def _files_and_digest(written: bytes) -> tuple[list[str], str] | None:
    """Return the names of an entry's files and their digest; None if a provenance is damaged or leads elsewhere."""
    from qeff_validate.artifact import fingerprint

    try:
        files: Any = json.loads(written)["files"]
        paths = [PurePosixPath(name) for name in files]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(files, dict) or any(path.is_absolute() or ".." in path.parts for path in paths):
        return None
    return list(files), fingerprint(files)
