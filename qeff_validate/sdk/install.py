# SPDX-License-Identifier: Apache-2.0
"""Lays the simulated SDK down at a prefix, as a real installation lies there, and takes it away again.

Other client software then finds compiler, bindings and tools where it looks for the real ones (card-contract §1.1). The
tree holds its own copy of the simulator and needs nothing else of this package. Its manifest, written before the first
file, lists every file with its digest: only what it lists is ever replaced or deleted, and only if nobody changed it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qeff_validate.errors import ConfigError
from qeff_validate.sdk.locate import SIMULATED, Sdk

MANIFEST = "simulated-sdk.json"
OLD_VERSION = "1.20.0.0"
"""The last kind of SDK whose compiler is ``qaic-exec`` (card-contract §1.2)."""
_PARTIAL = ".partial"

_BINDINGS = '''\
# SPDX-License-Identifier: Apache-2.0
"""Simulated runtime bindings of the Cloud AI 100 SDK, laid down by `qeff-validate sdk install`. There is no card."""

from .simulated.bindings.qaicrt import *
'''
_TOOLS = '''\
# SPDX-License-Identifier: Apache-2.0
"""Starts compiler or tools of the simulated SDK by name, for the commands in exec/ and tools/."""

import sys
from importlib import import_module

COMPILERS = {"qaic-compile": "qaic_compile", "qaic-exec": "qaic_exec"}
name, *arguments = sys.argv[1:]
if name in COMPILERS:
    sys.exit(import_module(f"simulated.compiler.{COMPILERS[name]}").main(arguments))
sys.exit(import_module("simulated.tools").main([name, *arguments]))
'''
# -E: the variables of the client's Python are not about the compiler's
_COMMAND = """\
#!/bin/sh
# Simulated Cloud AI 100 SDK, laid down by qeff-validate sdk install.
here=$(dirname "$(readlink -f "$0")")
exec {python} -E "$here/../dev/lib/{machine}/qaicrt" {name} "$@"
"""
_NEEDED = "import sys, google.protobuf, numpy, onnx, onnxruntime, yaml; sys.exit(sys.version_info < (3, 10))"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was laid down: each file with the digests that it may have, and the folders that were made for it."""

    files: Mapping[str, tuple[str, ...]]
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """What `remove_tree` took away, and what it left with the reason."""

    files: int
    kept: tuple[str, ...]


def interpreter(python: str | None = None) -> Path:
    """Return the interpreter that runs compiler and tools: this one, or another that has what they import.

    Raises:
        ConfigError: it is not there, is older than 3.10, or lacks a package.
    """
    found = shutil.which(python or sys.executable)
    if found is None:
        raise ConfigError(f"--python: {python} is no program")
    path = Path(found).absolute()  # not resolved: an environment's interpreter is a link
    try:
        done = subprocess.run(
            [str(path), "-E", "-c", _NEEDED], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as exc:
        raise ConfigError(f"--python: {path} cannot be started: {exc.strerror}") from exc
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it is older than Python 3.10"])[-1]
        raise ConfigError(f"--python: {path} cannot run the simulated compiler: {why}")
    return path


def install_tree(prefix: Path, python: Path, *, old: bool = False) -> list[str]:
    """Lay the tree down, or bring an own one up to date; returns the files, relative to the prefix.

    Args:
        prefix: missing, empty, or a tree that was laid down before.
        python: runs compiler and tools; see `interpreter`.
        old: as SDKs before 1.21 were: ``qaic-exec`` instead of ``qaic-compile``, and their version.

    Raises:
        ConfigError: something else is there, such as a real installation. Then nothing was written.
    """
    files = contents(python, old=old)
    digests = {name: (_digest(data),) for name, data in files.items()}
    known = _checked(prefix, files)
    folders = sorted({*known.folders, *_missing(prefix, files)})
    both = {name: (*known.files.get(name, ()), *digests.get(name, ())) for name in {*known.files, *digests}}
    try:
        prefix.mkdir(exist_ok=True)
        _write_manifest(prefix, Manifest(both, tuple(folders)))
        for name, data in files.items():
            _write(prefix / name, data, executable=name.startswith(("exec/", "tools/")))
        for name in known.files.keys() - files.keys():
            _unlink(prefix / name)
        _write_manifest(prefix, Manifest(digests, tuple(folders)))
        _drop_empty(prefix, folders)
    except OSError as exc:
        raise ConfigError(f"cannot write {exc.filename or prefix}: {exc.strerror}") from exc
    return sorted(files)


def remove_tree(prefix: Path) -> Removed:
    """Take away what `install_tree` laid down there, finished or not, and nothing else.

    Raises:
        ConfigError: nothing was laid down there, or it cannot be deleted.
    """
    manifest = _read_manifest(prefix)
    unfinished = prefix / (MANIFEST + _PARTIAL)
    if manifest is None and unfinished.is_file():
        manifest = Manifest({}, ())
    if manifest is None:
        raise ConfigError(f"{prefix} holds no simulated SDK that 'sdk install' laid down: there is no {MANIFEST}")
    gone, kept = 0, []
    try:
        for name, digests in sorted(manifest.files.items()):
            path = prefix / name
            if _is_ours(prefix, name, digests):
                _unlink(path)
                gone += 1
            elif os.path.lexists(path):
                kept.append(f"{name} (changed)")
            if _is_inside(prefix, name):
                path.with_name(path.name + _PARTIAL).unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
        (prefix / MANIFEST).unlink(missing_ok=True)
        _drop_empty(prefix, manifest.folders)
    except OSError as exc:
        raise ConfigError(f"cannot delete {exc.filename or prefix}: {exc.strerror}") from exc
    changed = {text.rpartition(" ")[0] for text in kept}
    kept += [f"{name} (not ours)" for name in _all_files(prefix) if name not in changed]
    return Removed(gone, tuple(kept))


def contents(python: Path, *, old: bool = False) -> dict[str, bytes]:
    """Return every file of a tree, relative to its prefix."""
    machine = platform.machine()
    package = f"dev/lib/{machine}/qaicrt"
    files = {f"{package}/__init__.py": _BINDINGS.encode(), f"{package}/__main__.py": _TOOLS.encode()}
    files["dev/python/QAicApi_pb2.py"] = (SIMULATED / "bindings" / "QAicApi_pb2.py").read_bytes()
    for path in sorted(SIMULATED.rglob("*")):
        if path.suffix in (".py", ".xml"):
            name, data = path.relative_to(SIMULATED).as_posix(), path.read_bytes()
            if path.suffix == ".xml":
                data = _as_old(data) if old else data
                files[name] = data  # versions/ at the prefix as well, where clients look
            files[f"{package}/simulated/{name}"] = data
    for place in ("exec/qaic-exec" if old else "exec/qaic-compile", "tools/qaic-util", "tools/qaic-version-util"):
        name = PurePosixPath(place).name
        text = _COMMAND.format(python=shlex.quote(str(python)), machine=machine, name=name)
        files[place] = text.encode()
    return files


def _as_old(xml: bytes) -> bytes:
    return re.sub(rb"(<base_version>).*(</base_version>)", rb"\g<1>" + OLD_VERSION.encode() + rb"\2", xml)


def _checked(prefix: Path, files: Iterable[str]) -> Manifest:
    """Return what of the prefix may be replaced; refuse if anything else is in the way."""
    if os.path.lexists(prefix) and not prefix.is_dir():
        raise ConfigError(f"{prefix} is no directory")
    if not prefix.parent.is_dir():
        raise ConfigError(f"{prefix.parent} does not exist; make it first")
    known = _read_manifest(prefix)
    if known is None:
        if prefix.is_dir() and {path.name for path in prefix.iterdir()} - {MANIFEST + _PARTIAL}:
            raise ConfigError(f"{prefix} {_what_is_there(prefix)}; nothing was written")
        return Manifest({}, () if prefix.is_dir() else (".",))
    taken = [
        name
        for name in sorted({*files, *known.files})
        if os.path.lexists(prefix / name) and not _is_ours(prefix, name, known.files.get(name, ()))
    ]
    if taken:
        raise ConfigError(
            f"{prefix} holds files that 'sdk install' did not write, or that were changed since: {', '.join(taken)};"
            " nothing was written"
        )
    return known


def _what_is_there(prefix: Path) -> str:
    sdk = Sdk(prefix)
    if sdk.simulated:
        return f"holds a simulated SDK without its {MANIFEST}: delete it by hand"
    versions = sorted({version for version in sdk.versions().values() if version})
    if versions:
        return f"holds an AI 100 SDK that is not simulated, version {', '.join(versions)}; it is never overwritten"
    return "is not empty, and 'sdk install' laid nothing down there"


def _is_inside(prefix: Path, name: str) -> bool:
    """Tell whether the file's folder is a folder of the prefix, not a link to elsewhere."""
    folder = (prefix / name).parent
    return folder.resolve() == prefix.resolve() / PurePosixPath(name).parent


def _is_ours(prefix: Path, name: str, digests: Iterable[str]) -> bool:
    path = prefix / name
    if path.is_symlink() or not path.is_file() or not _is_inside(prefix, name):
        return False
    return _digest(path.read_bytes()) in digests


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes, *, executable: bool = False) -> None:
    """Write a file so that it has its name only when it is whole; a name that is left over belongs to the manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_bytes(data)
    partial.chmod(0o755 if executable else 0o644)
    os.replace(partial, path)


def _unlink(path: Path) -> None:
    """Delete a file and the byte code that interpreters made of it."""
    path.unlink(missing_ok=True)
    cache = path.parent / "__pycache__"
    if path.suffix == ".py" and cache.is_dir():
        for compiled in cache.glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        with suppress(OSError):  # somebody else's byte code is in it
            cache.rmdir()


def _missing(prefix: Path, files: Iterable[str]) -> Iterator[str]:
    """The folders that have to be made."""
    for folder in {folder for name in files for folder in PurePosixPath(name).parents}:
        if not (prefix / folder).is_dir():
            yield str(folder)


def _drop_empty(prefix: Path, folders: Iterable[str]) -> None:
    for folder in sorted(folders, key=lambda name: -len(PurePosixPath(name).parts)):
        with suppress(OSError):  # not empty, or gone
            (prefix / folder).rmdir()


def _all_files(prefix: Path) -> list[str]:
    return sorted(
        (Path(folder) / name).relative_to(prefix).as_posix() for folder, _, names in os.walk(prefix) for name in names
    )


def _write_manifest(prefix: Path, manifest: Manifest) -> None:
    plain = {"format": 1, "simulated": True, "folders": manifest.folders, "files": manifest.files}
    _write(prefix / MANIFEST, (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode())


def _read_manifest(prefix: Path) -> Manifest | None:
    path = prefix / MANIFEST
    try:
        plain = json.loads(path.read_bytes())
        files = {str(name): tuple(map(str, digests)) for name, digests in plain["files"].items()}
        manifest = Manifest(files, tuple(map(str, plain["folders"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(f"{path} cannot be read ({exc}): delete the tree by hand") from exc
    for name in (*manifest.files, *manifest.folders):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"{path} names {name}, which is outside of {prefix}: delete the tree by hand")
    return manifest
