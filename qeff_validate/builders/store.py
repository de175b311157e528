# SPDX-License-Identifier: Apache-2.0
"""The content-addressed store: artifacts, inputs and references by what they were built from, shared by all processes.

Layout: ``<root>/<kind>/<key>/`` holds the files of one entry and ``provenance.json``, which lists the whole key, the
digest of every file and the duration of the build. An entry appears by one rename, so it is complete or not there. A
build happens in ``<root>/tmp/<kind>-<key>``, under a lock on the key; the lock ends with its process, so the remains of
a killed build are recognized and deleted. Every hit is verified against the digests. An entry that a process may still
read is not pruned (`leases`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_files, fingerprint
from qeff_validate.builders.file_locks import FileLock, lock, remove, try_lock
from qeff_validate.builders.leases import Leases
from qeff_validate.builders.shared_store import FULL, PROVENANCE, SharedStore
from qeff_validate.errors import BuildError, Unavailable
from qeff_validate.files import expand_user, read_bytes
from qeff_validate.tensors import Tensors, load_tensors, save_tensors

MAX_PROVENANCE_BYTES = 64 << 20
"""A larger ``provenance.json`` is not read; a key lists the digest of every file of a model."""

NO_ROOM = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""Errors of the file system that are caused by the store's location, not by the content."""

_KEY = re.compile(r"[0-9a-f]{40}")
"""Name of an entry; a directory with another name is not the store's and is never deleted."""

_INTERNAL = ("tmp", "locks", "leases")
"""Directories of the root that hold no entries."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored entry.

    Attributes:
        path: its directory.
        digest: SHA-256 of the names and digests of its files.
        provenance: the content of ``provenance.json``.
        made: True if this call built the entry, False if it existed.
    """

    path: Path
    digest: str
    provenance: Mapping[str, Any]
    made: bool

    @property
    def seconds(self) -> float:
        """Duration of the build, in this or in an earlier run."""
        return float(self.provenance["seconds"])


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """An entry in the list of `Store.entries`.

    Attributes:
        kind: ``onnx``, ``qpc``, ``inputs``, ``reference`` or ``floor``.
        path: its directory.
        size: bytes of all its files.
        used: time of its last use, in seconds since the epoch.
    """

    kind: str
    path: Path
    size: int
    used: float


class Store:
    """Entries below one directory, and at a URL if there is one.

    Args:
        location: the directory; or an fsspec URL such as ``s3://bucket/store``, from which entries that others made
            are copied into the default directory, and to which those made here are copied. None: the default directory,
            ``$QEFF_VALIDATE_HOME``, else the user's cache directory.

    Raises:
        MissingPackage: fsspec, or its package for the URL's protocol, is not installed.
        ConfigError: the protocol of the URL is unknown.
    """

    def __init__(self, location: Path | str | None = None) -> None:
        shared = isinstance(location, str) and "://" in location
        self.root = default_root() if shared or location is None else expand_user(location).resolve()
        self.location = str(location) if shared else str(self.root)
        """What opens this store in another process, or on another host."""
        self._shared = SharedStore(self.location) if shared else None
        self._known_there: set[str] = set()
        self.hits = 0
        """How many entries were there when they were asked for, in this directory or at the URL."""
        self._leases = Leases(self.root / "leases")

    def entry(
        self,
        kind: str,
        key: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        waiting: Callable[[], None] = lambda: None,
    ) -> Entry:
        """Return the entry for a key; build it if it is missing or damaged.

        Args:
            kind: ``onnx``, ``qpc``, ``inputs``, ``reference`` or ``floor``.
            key: plain data that changes with everything the content depends on.
            make: writes the files into an empty directory; if it raises, nothing remains.
            waiting: called once if another process is building the same entry.

        Raises:
            BuildError: the store cannot be written: no room, or no permission.
        """
        name = fingerprint({"kind": kind, "key": key})[:40]
        path = self.root / kind / name
        with self._locked(f"{kind}-{name}", waiting):
            entry = self._verified(path, key)
            if entry is None and self._shared is not None:
                entry = self._fetched(kind, name, key, self._shared)
            self.hits += entry is not None
            if entry is None:
                entry = self._make(kind, name, key, make)
            if self._shared is not None and name not in self._known_there:
                if entry.made or not self._shared.has(kind, name):
                    self._shared.keep(kind, name, entry.path, entry.digest)
                self._known_there.add(name)
            return entry

    def tensors(
        self,
        kind: str,
        key: Mapping[str, Any],
        make: Callable[[], Tensors],
        *,
        waiting: Callable[[], None] = lambda: None,
    ) -> tuple[Tensors, Entry]:
        """Return the tensors stored for a key; computed on a miss, or if their file cannot be read.

        Args:
            kind: see `entry`.
            key: see `entry`.
            make: computes the tensors.
            waiting: called once if another process is computing them.

        Raises:
            BuildError: the store cannot be written.
        """

        def stored_entry() -> Entry:
            return self.entry(
                kind, key, lambda folder: save_tensors(folder / "tensors.safetensors", make()), waiting=waiting
            )

        entry = stored_entry()
        try:
            return load_tensors(entry.path / "tensors.safetensors"), entry
        except Unavailable:  # digest and file were both changed
            with self._locked(f"{kind}-{entry.path.name}"), self._translated():
                remove(entry.path)
        entry = stored_entry()
        return load_tensors(entry.path / "tensors.safetensors"), entry

    def entries(self) -> list[EntryInfo]:
        """Return all entries, damaged ones included, the least recently used one first."""
        entries = []
        for path in self.root.glob("*/*"):
            if path.parent.name not in _INTERNAL and _KEY.fullmatch(path.name):
                with contextlib.suppress(OSError):  # another process may delete it meanwhile
                    entries.append(EntryInfo(path.parent.name, path, _size(path), _last_use(path)))
        return sorted(entries, key=lambda entry: entry.used)

    def prune(self, *, unused_since: float) -> list[EntryInfo]:
        """Delete and return the entries that were last used before a time.

        An entry that another process is building, or may still read, is skipped. The remains of killed processes are
        deleted too.

        Args:
            unused_since: seconds since the epoch.

        Raises:
            BuildError: something cannot be deleted.
        """
        with self._translated():
            self._sweep()
            return [entry for entry in self.entries() if entry.used < unused_since and self._delete(entry)]

    def _delete(self, entry: EntryInfo) -> bool:
        name = f"{entry.kind}-{entry.path.name}"
        entry_lock = self._try_lock(name)
        if entry_lock is None:
            return False
        try:
            if name in self._leases.others() or not os.path.lexists(entry.path):
                return False
            # one rename first, so that an interruption leaves no incomplete entry at its path
            trash = self.root / "tmp" / name
            trash.parent.mkdir(parents=True, exist_ok=True)
            remove(trash)
            os.replace(entry.path, trash)
            remove(trash)
        finally:
            entry_lock.close()
        return True

    def _sweep(self) -> None:
        """Delete the leases, locks and unfinished builds of killed processes."""
        self._leases.sweep()
        stale = [path.name for path in (self.root / "tmp").glob("*")]
        stale += [path.stem for path in (self.root / "locks").glob("*.lock")]
        for name in stale:
            entry_lock = self._try_lock(name) if _KEY.fullmatch(name.rpartition("-")[2]) else None
            if entry_lock is not None:
                try:
                    remove(self.root / "tmp" / name)
                finally:
                    entry_lock.close()

    def _try_lock(self, name: str) -> FileLock | None:
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        return try_lock(self.root / "locks" / f"{name}.lock")

    def _verified(self, path: Path, key: Mapping[str, Any]) -> Entry | None:
        """Return the entry if its files are those that were built, else None."""
        try:
            provenance = json.loads(read_bytes(path / PROVENANCE, most_bytes=MAX_PROVENANCE_BYTES))
            if not isinstance(provenance, dict) or not _is_duration(provenance.get("seconds")):
                return None
            if provenance.get("bytes") != _size(path) - (path / PROVENANCE).stat().st_size:
                return None  # before any file is read: a damaged one may have any size
            files = _digests(path)
        except (OSError, ValueError, RecursionError):
            return None
        files.pop(PROVENANCE, None)
        if provenance.get("files") != files or provenance.get("key") != json.loads(json.dumps(key)):
            return None
        with contextlib.suppress(OSError):  # a read-only store records no times of use
            os.utime(path / PROVENANCE)
        return Entry(path, fingerprint(files), provenance, made=False)

    def _fetched(self, kind: str, name: str, key: Mapping[str, Any], shared: SharedStore) -> Entry | None:
        """Copy an entry from the URL; return None if it is not there, or damaged."""
        path = self.root / kind / name
        with self._work_folder(kind, name) as work, self._translated(FULL):
            if not shared.fetch(kind, name, work):
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work, path)
        entry = self._verified(path, key)
        if entry is not None:
            self._known_there.add(name)
        return entry

    def _make(self, kind: str, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Entry:
        path = self.root / kind / name
        with self._work_folder(kind, name) as work:
            start = time.perf_counter()
            with self._translated(NO_ROOM):
                make(work)
            with self._translated():
                files = _digests(work)
                provenance = {
                    "schema": 1,
                    "kind": kind,
                    "key": key,
                    "files": files,
                    "bytes": _size(work),
                    "seconds": round(time.perf_counter() - start, 4),
                    "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                }
                (work / PROVENANCE).write_text(json.dumps(provenance, indent=1, sort_keys=True), encoding="utf-8")
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(work, path)
        return Entry(path, fingerprint(files), provenance, made=True)

    @contextmanager
    def _work_folder(self, kind: str, name: str) -> Iterator[Path]:
        """Yield an empty directory for an entry that is made; what stands in the entry's place is damaged, and goes."""
        work = self.root / "tmp" / f"{kind}-{name}"
        try:
            with self._translated():
                remove(self.root / kind / name)
                remove(work)  # of a killed process: we hold its lock now
                work.mkdir(parents=True)
            yield work
        finally:
            with contextlib.suppress(OSError):
                remove(work)

    @contextmanager
    def _locked(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock on an entry, and add the entry to the lease of this process."""
        with self._translated():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            entry_lock = lock(self.root / "locks" / f"{name}.lock", waiting)
        try:
            with self._translated():
                if not self._leases.is_open:
                    self._sweep()
                self._leases.add(name)
            yield
        finally:
            with contextlib.suppress(OSError):
                entry_lock.close()

    @contextmanager
    def _translated(self, numbers: tuple[int, ...] | None = None) -> Iterator[None]:
        """Raise a BuildError instead of an error of the file system.

        Args:
            numbers: the ``errno`` values to translate; None: all.
        """
        try:
            yield
        except OSError as exc:
            if numbers is not None and exc.errno not in numbers:
                raise
            where = f"{exc.filename}: " if exc.filename is not None else ""
            raise BuildError(
                f"cannot write to the store {self.root}: {where}{exc.strerror or exc}; nothing was kept. Free some"
                " room, take away what stands there, or choose another place with --store DIR or QEFF_VALIDATE_HOME"
            ) from exc


def default_root() -> Path:
    """Return ``$QEFF_VALIDATE_HOME`` or the user's cache directory."""
    home = os.environ.get("QEFF_VALIDATE_HOME")
    if home:
        return expand_user(home).resolve()
    from platformdirs import user_cache_path

    return user_cache_path("qeff-validate")


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file.

    Raises:
        ValueError: the folder contains a link, a pipe, a device or another irregular file.
        OSError: a file cannot be read.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        files += [Path(parent) / name for name in names]
        links = [Path(parent) / name for name in folders if (Path(parent) / name).is_symlink()]
        irregular = next((path for path in (*links, *files) if path.is_symlink() or not path.is_file()), None)
        if irregular is not None:
            raise ValueError(f"{irregular} is no regular file")
    return digest_files(files, root=folder)


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _size(folder: Path) -> int:
    if folder.is_symlink():
        return 0
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files)


def _last_use(folder: Path) -> float:
    path = folder / PROVENANCE
    return (path if os.path.lexists(path) else folder).lstat().st_mtime
