# SPDX-License-Identifier: Apache-2.0
"""The content-addressed store: what was made from what, once, for any number of processes.

Layout: ``<root>/<kind>/<key>/`` holds the files of one entry and ``provenance.json``, which lists the whole key, the
digest of every file and how long making took. An entry appears by one rename, so it is there whole or not at all.
A build happens in ``<root>/tmp/<kind>-<key>``, under a lock on the key; the lock dies with its process, so what a
killed one left behind is recognised and removed. Every hit is verified against the digests. ``<root>/leases/`` has a
locked file for each open store, which lists the entries that it has found: these are not pruned.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_files, digest_tree, fingerprint
from qeff_validate.builders.file_locks import FileLock, lock, remove, try_lock
from qeff_validate.errors import BuildError, Unavailable
from qeff_validate.files import expand_user, read_bytes
from qeff_validate.tensors import Tensors, load_tensors, save_tensors

PROVENANCE = "provenance.json"
_MOST_BYTES = 64 << 20
"""Of a provenance; a key lists the digest of every file of a model."""

NO_ROOM = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""Errors of the file system that are about the store, whatever was written there."""

_KEY = re.compile(r"[0-9a-f]{40}")
"""Name of an entry; what is called otherwise is not ours, and never deleted."""

_LEASE = re.compile(r"[0-9]+-[0-9a-f]{32}")
"""Name of a lease: process id and a random number."""

_OTHERS = ("tmp", "locks", "leases")
"""Directories of the root that hold no entries."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored entry.

    Attributes:
        path: its directory.
        digest: SHA-256 over the names and digests of its files.
        provenance: what ``provenance.json`` says.
        made: True if this call made it, False if it was there.
    """

    path: Path
    digest: str
    provenance: Mapping[str, Any]
    made: bool

    @property
    def seconds(self) -> float:
        """How long making it took, whenever that was."""
        return float(self.provenance["seconds"])


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry as `Store.entries` lists it: kind, directory, bytes, and when it was last made or found (epoch)."""

    kind: str
    path: Path
    size: int
    used: float


class Store:
    """Entries below one directory: ``root``, else ``$QEFF_VALIDATE_HOME``, else the user's cache directory."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = expand_user(root).resolve() if root is not None else default_root()
        self._lease: FileLock | None = None

    def entry(
        self,
        kind: str,
        key: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        waiting: Callable[[], None] = lambda: None,
    ) -> Entry:
        """Return the entry for a key; make it if it is missing or damaged.

        Args:
            kind: ``onnx``, ``qpc``, ``inputs``, ``reference`` or ``floor``.
            key: plain data that changes with everything the content depends on.
            make: writes the files into an empty directory; if it raises, nothing is left.
            waiting: called once if another process is making the same entry.

        Raises:
            BuildError: the store cannot be written: no room, or no permission.
        """
        name = fingerprint({"kind": kind, "key": key})[:40]
        place = self.root / kind / name
        with self._locked(f"{kind}-{name}", waiting):
            found = self._verified(place, key)
            if found is not None:
                return found
            return self._make(kind, name, key, make)

    def tensors(self, kind: str, key: Mapping[str, Any], make: Callable[[], Tensors]) -> tuple[Tensors, Entry]:
        """Return stored tensors for a key, made on a miss, or if their file cannot be read."""

        def entry() -> Entry:
            return self.entry(kind, key, lambda folder: save_tensors(folder / "tensors.safetensors", make()))

        stored = entry()
        try:
            return load_tensors(stored.path / "tensors.safetensors"), stored
        except Unavailable:  # somebody has changed digest and file
            with self._locked(f"{kind}-{stored.path.name}"), self._translated():
                remove(stored.path)
        stored = entry()
        return load_tensors(stored.path / "tensors.safetensors"), stored

    def entries(self) -> list[Kept]:
        """Return all entries, damaged ones too, the one that was used longest ago first."""
        found = []
        for path in self.root.glob("*/*"):
            if path.parent.name not in _OTHERS and _KEY.fullmatch(path.name):
                with contextlib.suppress(OSError):  # it may go away meanwhile
                    found.append(Kept(path.parent.name, path, _size(path), _last_use(path)))
        return sorted(found, key=lambda kept: kept.used)

    def prune(self, *, unused_since: float) -> list[Kept]:
        """Delete the entries that were last used before a time, in seconds since the epoch; return them.

        An entry that another process is making, or has found and still may read, is left alone. What killed processes
        have left is deleted, too.

        Raises:
            BuildError: something cannot be deleted.
        """
        with self._translated():
            self._sweep()
            return [kept for kept in self.entries() if kept.used < unused_since and self._drop(kept)]

    def _drop(self, kept: Kept) -> bool:
        name = f"{kept.kind}-{kept.path.name}"
        held = self._try_lock(name)
        if held is None:
            return False
        try:
            if name in self._leased() or not os.path.lexists(kept.path):
                return False
            # out of sight by one rename first, so that an interruption leaves no half entry under its name
            away = self.root / "tmp" / name
            away.parent.mkdir(parents=True, exist_ok=True)
            remove(away)
            os.replace(kept.path, away)
            remove(away)
        finally:
            held.close()
        return True

    def _leased(self) -> set[str]:
        """Return the names of entries that other open stores have found."""
        names: set[str] = set()
        for path in self._leases():
            with contextlib.suppress(FileNotFoundError):
                names.update(path.read_text(encoding="ascii").split())
        return names

    def _leases(self) -> list[Path]:
        own = None if self._lease is None else self._lease.path
        found = (self.root / "leases").glob("*")
        return [path for path in found if path != own and _LEASE.fullmatch(path.name)]

    def _sweep(self) -> None:
        """Delete what killed processes have left: their leases, their locks and their unfinished work."""
        for path in self._leases():
            held = try_lock(path)
            if held is not None:
                held.close()
        stale = [path.name for path in (self.root / "tmp").glob("*")]
        stale += [path.stem for path in (self.root / "locks").glob("*.lock")]
        for name in stale:
            held = self._try_lock(name) if _KEY.fullmatch(name.rpartition("-")[2]) else None
            if held is not None:
                try:
                    remove(self.root / "tmp" / name)
                finally:
                    held.close()

    def _try_lock(self, name: str) -> FileLock | None:
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        return try_lock(self.root / "locks" / f"{name}.lock")

    def _hold(self, name: str) -> None:
        """Note in our lease that an entry is in use; the lock on its key is held."""
        if self._lease is None:
            (self.root / "leases").mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._lease = lock(self.root / "leases" / f"{os.getpid()}-{uuid.uuid4().hex}")
            weakref.finalize(self, _let_go, self._lease)
        try:
            os.write(self._lease.number, f"{name}\n".encode())
        except OSError as exc:  # on a full disk, what is there can still be used
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise

    def _verified(self, place: Path, key: Mapping[str, Any]) -> Entry | None:
        """Return an entry that is as it was made, else None."""
        try:
            provenance = json.loads(read_bytes(place / PROVENANCE, most_bytes=_MOST_BYTES))
            if not isinstance(provenance, dict) or not _is_duration(provenance.get("seconds")):
                return None
            if provenance.get("bytes") != _size(place) - (place / PROVENANCE).stat().st_size:
                return None  # before anything is read: a damaged length may be any
            files = _digests(place)
        except (OSError, ValueError, RecursionError):
            return None
        files.pop(PROVENANCE, None)
        if provenance.get("files") != files or provenance.get("key") != json.loads(json.dumps(key)):
            return None
        with contextlib.suppress(OSError):  # a store that is only read keeps no times
            os.utime(place / PROVENANCE)
        return Entry(place, fingerprint(files), provenance, made=False)

    def _make(self, kind: str, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Entry:
        work, place = self.root / "tmp" / f"{kind}-{name}", self.root / kind / name
        try:
            with self._translated():
                remove(place)  # damaged
                remove(work)  # a killed process left it: its lock is ours now
                work.mkdir(parents=True)
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
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(work, place)
        finally:
            with contextlib.suppress(OSError):
                remove(work)
        return Entry(place, fingerprint(files), provenance, made=True)

    @contextmanager
    def _locked(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock on an entry, which is in use from then on."""
        with self._translated():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            held = lock(self.root / "locks" / f"{name}.lock", waiting)
        try:
            with self._translated():
                self._hold(name)
            yield
        finally:
            with contextlib.suppress(OSError):
                held.close()

    @contextmanager
    def _translated(self, numbers: tuple[int, ...] | None = None) -> Iterator[None]:
        """Turn errors of the file system into a BuildError: those with some numbers, or all."""
        try:
            yield
        except OSError as exc:
            if numbers is not None and exc.errno not in numbers:
                raise
            place = f"{exc.filename}: " if exc.filename is not None else ""
            raise BuildError(
                f"cannot write to the store {self.root}: {place}{exc.strerror or exc}; nothing was kept. Free some"
                " room, take away what stands there, or choose another place with --store DIR or QEFF_VALIDATE_HOME"
            ) from exc


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file.

    Raises:
        ValueError: there is something else than files and directories: a link, a pipe, a device.
        OSError: something cannot be read.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        files += [Path(parent) / name for name in names]
        links = [Path(parent) / name for name in folders if (Path(parent) / name).is_symlink()]
        odd = next((path for path in (*links, *files) if path.is_symlink() or not path.is_file()), None)
        if odd is not None:
            raise ValueError(f"{odd} is no regular file")
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


def _let_go(lease: FileLock) -> None:
    if lease.path.name.startswith(f"{os.getpid()}-"):  # a forked process has a copy, and no say
        with contextlib.suppress(OSError):  # its directory may be gone
            lease.close()


def default_root() -> Path:
    """Return ``$QEFF_VALIDATE_HOME`` or the user's cache directory."""
    home = os.environ.get("QEFF_VALIDATE_HOME")
    if home:
        return expand_user(home).resolve()
    from platformdirs import user_cache_path

    return user_cache_path("qeff-validate")


SHAPES_ARTIFACTS = ("builders", "models")
"""Folders whose source is part of the key of what is stored, but for `JUDGES`."""

JUDGES = (
    "models/padding_hint.py",
    "models/embedding/filler_rows.py",
    "models/embedding/relations.py",
    "models/causal_lm/failure_hints.py",
    "models/causal_lm/relation_kv_cache.py",
    "models/causal_lm/relation_linearity.py",
    "models/causal_lm/relations.py",
    "models/causal_lm/verdict.py",
    "models/causal_lm/workloads.py",
)
"""Modules in these folders that judge or explain: no artifact, reference or input depends on them."""

PACKAGE = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=1)
def code_key() -> str:
    """Return a digest of the source of everything that shapes an artifact, so that a fix never meets old output."""
    digests = {f"{folder}/{name}": digest for folder in SHAPES_ARTIFACTS for name, digest in _sources(folder).items()}
    return fingerprint({name: digest for name, digest in digests.items() if name not in JUDGES})


@lru_cache(maxsize=1)
def measures_key() -> str:
    """Return a digest of the source of everything that measures: a stored noise floor holds its numbers."""
    return fingerprint({**_sources("comparison"), **digest_files((PACKAGE / name for name in JUDGES), root=PACKAGE)})


def _sources(folder: str) -> dict[str, str]:
    return digest_tree(PACKAGE / folder, suffixes=(".py",))
