# SPDX-License-Identifier: Apache-2.0
"""Installs the simulated SDK at a prefix, with the layout of a real installation, and removes it again.

Other client software then finds compiler, bindings and tools where it expects the real ones (card-contract §1.1). The
tree contains its own copy of the simulator and is independent of this package. Its manifest, written before the first
file, lists every file with its digest: only listed files are replaced or deleted, and only if they are unchanged.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qeff_validate.errors import ConfigError
from qeff_validate.sdk.install_manifest import MANIFEST, PARTIAL, Manifest, read_manifest, write_file, write_manifest
from qeff_validate.sdk.locate import SIMULATED, Sdk

OLD_VERSION = "1.20.0.0"
"""Version of a tree whose compiler is ``qaic-exec`` (card-contract §1.2)."""

_BINDINGS = '''\
# SPDX-License-Identifier: Apache-2.0
"""Simulated runtime bindings of the Cloud AI 100 SDK, installed by `qeff-validate sdk install`. There is no card."""

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
# -E: PYTHONPATH and PYTHONHOME of the client are meant for another interpreter
_COMMAND = """\
#!/bin/sh
# Simulated Cloud AI 100 SDK, installed by qeff-validate sdk install.
here=$(dirname "$(readlink -f "$0")")
exec {python} -E "$here/../dev/lib/{machine}/qaicrt" {name} "$@"
"""
_NEEDED = "import sys, google.protobuf, numpy, onnx, onnxruntime, yaml; sys.exit(sys.version_info < (3, 10))"


@dataclass(frozen=True, slots=True)
class Removed:
    """The result of `remove_tree`.

    Attributes:
        files: number of deleted files.
        kept: the files that remain, each with the reason.
    """

    files: int
    kept: tuple[str, ...]


def interpreter(python: str | None = None) -> Path:
    """Return the path of the interpreter for compiler and tools.

    Args:
        python: name or path of an interpreter; None: the one that runs this.

    Raises:
        ConfigError: it does not exist, is older than Python 3.10, or lacks a package.
    """
    executable = shutil.which(python or sys.executable)
    if executable is None:
        raise ConfigError(f"--python: {python} is no program")
    path = Path(executable).absolute()  # not resolved: the interpreter of a virtual environment is a link
    try:
        result = subprocess.run(
            [str(path), "-E", "-c", _NEEDED], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as exc:
        raise ConfigError(f"--python: {path} cannot be started: {exc.strerror}") from exc
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it is older than Python 3.10"])[-1]
        raise ConfigError(f"--python: {path} cannot run the simulated compiler: {reason}")
    return path


def install_tree(prefix: Path, python: Path, *, old: bool = False) -> list[str]:
    """Install the simulated SDK, or update an earlier installation.

    Args:
        prefix: a directory that is missing, empty, or an earlier installation.
        python: interpreter of compiler and tools; see `interpreter`.
        old: the layout of SDKs before 1.21: ``qaic-exec`` instead of ``qaic-compile``, and an older version.

    Returns:
        The paths of all files, relative to the prefix.

    Raises:
        ConfigError: the prefix contains other files, such as a real installation, and nothing was written; or a file
            cannot be written.
    """
    files = contents(python, old=old)
    digests = {name: (_digest(data),) for name, data in files.items()}
    installed = _replaceable(prefix, files)
    folders = sorted({*installed.folders, *_missing_folders(prefix, files)})
    # during the update a file may have its earlier or its new content
    both = {name: (*installed.files.get(name, ()), *digests.get(name, ())) for name in {*installed.files, *digests}}
    try:
        prefix.mkdir(exist_ok=True)
        write_manifest(prefix, Manifest(both, tuple(folders)))
        for name, data in files.items():
            write_file(prefix / name, data, executable=name.startswith(("exec/", "tools/")))
        for name in installed.files.keys() - files.keys():
            _unlink(prefix / name)
        write_manifest(prefix, Manifest(digests, tuple(folders)))
        _remove_empty(prefix, folders)
    except OSError as exc:
        raise ConfigError(f"cannot write {exc.filename or prefix}: {exc.strerror}") from exc
    return sorted(files)


def remove_tree(prefix: Path) -> Removed:
    """Remove an installation, complete or not, and nothing else.

    Args:
        prefix: the directory of the installation.

    Raises:
        ConfigError: there is no installation, or it cannot be deleted.
    """
    manifest = read_manifest(prefix)
    unfinished = prefix / (MANIFEST + PARTIAL)
    if manifest is None and unfinished.is_file():
        manifest = Manifest({}, ())
    if manifest is None:
        raise ConfigError(f"{prefix} holds no simulated SDK that 'sdk install' wrote: there is no {MANIFEST}")
    deleted, kept = 0, []
    try:
        for name, digests in sorted(manifest.files.items()):
            path = prefix / name
            if _is_ours(prefix, name, digests):
                _unlink(path)
                deleted += 1
            elif os.path.lexists(path):
                kept.append(f"{name} (changed)")
            if _is_inside(prefix, name):
                path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
        (prefix / MANIFEST).unlink(missing_ok=True)
        _remove_empty(prefix, manifest.folders)
    except OSError as exc:
        raise ConfigError(f"cannot delete {exc.filename or prefix}: {exc.strerror}") from exc
    changed = {text.rpartition(" ")[0] for text in kept}
    kept += [f"{name} (not ours)" for name in _all_files(prefix) if name not in changed]
    return Removed(deleted, tuple(kept))


def contents(python: Path, *, old: bool = False) -> dict[str, bytes]:
    """Return the content of every file of a tree, by its path relative to the prefix."""
    machine = platform.machine()
    package = f"dev/lib/{machine}/qaicrt"
    files = {f"{package}/__init__.py": _BINDINGS.encode(), f"{package}/__main__.py": _TOOLS.encode()}
    files["dev/python/QAicApi_pb2.py"] = (SIMULATED / "bindings" / "QAicApi_pb2.py").read_bytes()
    for path in sorted(SIMULATED.rglob("*")):
        if path.suffix in (".py", ".xml"):
            name, data = path.relative_to(SIMULATED).as_posix(), path.read_bytes()
            if path.suffix == ".xml":
                data = _with_old_version(data) if old else data
                files[name] = data  # versions/ at the prefix too, where clients look
            files[f"{package}/simulated/{name}"] = data
    for path_name in ("exec/qaic-exec" if old else "exec/qaic-compile", "tools/qaic-util", "tools/qaic-version-util"):
        name = PurePosixPath(path_name).name
        text = _COMMAND.format(python=shlex.quote(str(python)), machine=machine, name=name)
        files[path_name] = text.encode()
    return files


def _with_old_version(xml: bytes) -> bytes:
    return re.sub(rb"(<base_version>).*(</base_version>)", rb"\g<1>" + OLD_VERSION.encode() + rb"\2", xml)


def _replaceable(prefix: Path, files: Iterable[str]) -> Manifest:
    """Return the manifest of the files that may be replaced.

    Raises:
        ConfigError: another file is in the way.
    """
    if os.path.lexists(prefix) and not prefix.is_dir():
        raise ConfigError(f"{prefix} is no directory")
    if not prefix.parent.is_dir():
        raise ConfigError(f"{prefix.parent} does not exist; make it first")
    installed = read_manifest(prefix)
    if installed is None:
        if prefix.is_dir() and {path.name for path in prefix.iterdir()} - {MANIFEST + PARTIAL}:
            raise ConfigError(f"{prefix} {_description(prefix)}; nothing was written")
        return Manifest({}, () if prefix.is_dir() else (".",))
    foreign = [
        name
        for name in sorted({*files, *installed.files})
        if os.path.lexists(prefix / name) and not _is_ours(prefix, name, installed.files.get(name, ()))
    ]
    if foreign:
        raise ConfigError(
            f"{prefix} holds files that 'sdk install' did not write, or that were changed since: {', '.join(foreign)};"
            " nothing was written"
        )
    return installed


def _description(prefix: Path) -> str:
    """Describe what a prefix without a manifest contains, for an error."""
    sdk = Sdk(prefix)
    if sdk.simulated:
        return f"holds a simulated SDK without its {MANIFEST}: delete it by hand"
    versions = sorted({version for version in sdk.versions().values() if version})
    if versions:
        return f"holds an AI 100 SDK that is not simulated, version {', '.join(versions)}; it is never overwritten"
    return "is not empty, and 'sdk install' wrote nothing there"


def _is_inside(prefix: Path, name: str) -> bool:
    """Return True if the file's folder is inside the prefix, not a link to elsewhere."""
    folder = (prefix / name).parent
    return folder.resolve() == prefix.resolve() / PurePosixPath(name).parent


def _is_ours(prefix: Path, name: str, digests: Iterable[str]) -> bool:
    path = prefix / name
    if path.is_symlink() or not path.is_file() or not _is_inside(prefix, name):
        return False
    return _digest(path.read_bytes()) in digests


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unlink(path: Path) -> None:
    """Delete a file and its compiled byte code."""
    path.unlink(missing_ok=True)
    cache = path.parent / "__pycache__"
    if path.suffix == ".py" and cache.is_dir():
        for compiled in cache.glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        with suppress(OSError):  # it contains byte code of other files
            cache.rmdir()


def _missing_folders(prefix: Path, files: Iterable[str]) -> Iterator[str]:
    """Yield the directories that do not exist yet, relative to the prefix."""
    for folder in {folder for name in files for folder in PurePosixPath(name).parents}:
        if not (prefix / folder).is_dir():
            yield str(folder)


def _remove_empty(prefix: Path, folders: Iterable[str]) -> None:
    for folder in sorted(folders, key=lambda name: -len(PurePosixPath(name).parts)):
        with suppress(OSError):  # not empty, or gone
            (prefix / folder).rmdir()


def _all_files(prefix: Path) -> list[str]:
    return sorted(
        (Path(folder) / name).relative_to(prefix).as_posix() for folder, _, names in os.walk(prefix) for name in names
    )
