# SPDX-License-Identifier: Apache-2.0
"""The content-addressed store: what was made from what, once, for any number of processes.

Layout: ``<root>/<kind>/<key>/`` holds the files of one entry and ``provenance.json``, which lists the whole key, the
digest of every file and how long making took. An entry appears by one rename, so it is there whole or not at all.
A build happens in ``<root>/tmp/<kind>-<key>``, under a lock on the key; the lock dies with its process, so what a
killed one left behind is recognised by the next holder and removed. Every hit is verified against the digests.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_tree, fingerprint
from qeff_validate.errors import BuildError
from qeff_validate.files import expand_user
from qeff_validate.tensors import Tensors, load_tensors, save_tensors

PROVENANCE = "provenance.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


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
        with self._guarded(kind, name, waiting):
            found = self._verified(place, key)
            if found is not None:
                return found
            shutil.rmtree(place, ignore_errors=True)
            return self._make(kind, name, key, make)

    def tensors(self, kind: str, key: Mapping[str, Any], make: Callable[[], Tensors]) -> tuple[Tensors, Entry]:
        """Return stored tensors for a key, made on a miss."""
        entry = self.entry(kind, key, lambda folder: save_tensors(folder / "tensors.safetensors", make()))
        return load_tensors(entry.path / "tensors.safetensors"), entry

    def entries(self) -> list[Kept]:
        """Return all entries, the one that was used longest ago first."""
        found = []
        for path in self.root.glob(f"*/*/{PROVENANCE}"):
            if path.parent.parent.name in ("tmp", "locks"):
                continue
            size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            found.append(Kept(path.parent.parent.name, path.parent, size, path.stat().st_mtime))
        return sorted(found, key=lambda kept: kept.used)

    def prune(self, *, unused_since: float) -> list[Kept]:
        """Delete the entries that were last used before a time, in seconds since the epoch; return them.

        An entry that another process is making or checking is left alone.
        """
        return [kept for kept in self.entries() if kept.used < unused_since and self._drop(kept)]

    def _drop(self, kept: Kept) -> bool:
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / "locks" / f"{kept.kind}-{kept.path.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            # out of sight by one rename first, so that an interruption leaves no half entry under its name
            away = self.root / "tmp" / f"{kept.kind}-{kept.path.name}"
            away.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(away, ignore_errors=True)
            os.replace(kept.path, away)
            shutil.rmtree(away, ignore_errors=True)
        finally:
            lock.release()
        return True

    def _verified(self, place: Path, key: Mapping[str, Any]) -> Entry | None:
        try:
            provenance = json.loads((place / PROVENANCE).read_text(encoding="utf-8"))
            files = digest_tree(place)
        except (OSError, ValueError):
            return None
        files.pop(PROVENANCE, None)
        if provenance.get("files") != files or provenance.get("key") != json.loads(json.dumps(key)):
            return None
        with contextlib.suppress(OSError):  # a store that is only read keeps no times
            os.utime(place / PROVENANCE)
        return Entry(place, fingerprint(files), provenance, made=False)

    def _make(self, kind: str, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Entry:
        work = self.root / "tmp" / f"{kind}-{name}"
        shutil.rmtree(work, ignore_errors=True)  # a killed process left it: its lock is ours now
        try:
            work.mkdir(parents=True)
            start = time.perf_counter()
            make(work)
            files = digest_tree(work)
            provenance = {
                "schema": 1,
                "kind": kind,
                "key": key,
                "files": files,
                "seconds": round(time.perf_counter() - start, 4),
                "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            (work / PROVENANCE).write_text(json.dumps(provenance, indent=1, sort_keys=True), encoding="utf-8")
            place = self.root / kind / name
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Entry(place, fingerprint(files), provenance, made=True)

    @contextmanager
    def _guarded(self, kind: str, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "locks" / f"{kind}-{name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire()
            try:
                yield
            finally:
                lock.release()
        except OSError as exc:
            if exc.errno in _NO_ROOM:
                raise BuildError(
                    f"cannot write to the store {self.root}: {exc.strerror}; nothing was kept."
                    " Free some room, or choose another place with --store DIR or QEFF_VALIDATE_HOME"
                ) from exc
            raise


def default_root() -> Path:
    """Return ``$QEFF_VALIDATE_HOME`` or the user's cache directory."""
    home = os.environ.get("QEFF_VALIDATE_HOME")
    if home:
        return expand_user(home).resolve()
    from platformdirs import user_cache_path

    return user_cache_path("qeff-validate")


@lru_cache(maxsize=1)
def code_key() -> str:
    """Return a digest of the source of everything that shapes an artifact, so that a fix never meets old output."""
    package = Path(__file__).resolve().parent.parent
    folders = {name: digest_tree(package / name, suffixes=(".py",)) for name in ("models", "builders")}
    return fingerprint(folders)
