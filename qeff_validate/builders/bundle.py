# SPDX-License-Identifier: Apache-2.0
"""Bundles: QPCs with their inputs and reference outputs, built on one host and validated on another.

Layout: ``bundle.json`` (runtime, cases, size and digest of every file, and a digest of all of this) and, for each case,
``CASE/qpc/programqpc.bin``, ``CASE/about.json`` (provenance of the QPC) and ``CASE/reference.safetensors``. Reading
verifies every byte first; nothing in a changed bundle is validated, and no name in a bundle is imported.

The digest detects accidents and edits. It is no signature: an attacker can recompute it, unless the reader compares it
with the digest that was printed when the bundle was built.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qeff_validate.artifact import digest_file, digest_tree, fingerprint
from qeff_validate.builders.provenance import QPC_PROVENANCE
from qeff_validate.config.case import Artifacts, Case
from qeff_validate.config.explain import explain
from qeff_validate.config.strict import Strict
from qeff_validate.errors import BuildError, ConfigError, Unavailable
from qeff_validate.files import read_bytes, temporary_beside
from qeff_validate.folders import check_writable, folder_entries
from qeff_validate.protocols import runtime as runtime_for

MANIFEST = "bundle.json"
SCHEMA = 3

MAX_MANIFEST_BYTES = 64 << 20
"""A larger manifest is not read; that of a hundred cases has 200 kB."""


class Manifest(Strict):
    """The content of ``bundle.json`` without ``schema``."""

    runtime: str
    cases: list[Case]
    files: dict[str, str]
    sizes: dict[str, int]
    environment: dict[str, Any]
    digest: str


def check_new(folder: Path) -> None:
    """Check that a bundle can be written.

    Args:
        folder: the directory of the bundle.

    Raises:
        ConfigError: it exists already, or its parent directory is not writable.
    """
    check_writable(folder.parent, "--bundle")
    check_writable(folder, "--bundle")
    if os.path.lexists(folder):
        raise ConfigError(f"--bundle: {folder} exists already; name a new directory")


def write_bundle(
    folder: Path, members: Sequence[tuple[Case, Path, Path]], *, runtime: str, environment: Mapping[str, Any]
) -> str:
    """Write a bundle; the folder appears by one rename.

    Args:
        folder: must not exist yet.
        members: case, QPC directory and recorded reference, one tuple per case.
        runtime: the runtime that the QPCs were compiled for, ``ai100`` or ``sim``.
        environment: of the host that built the QPCs, as plain data.

    Returns:
        The digest of the bundle: hex SHA-256 of its manifest, which contains the digest of every file.

    Raises:
        ConfigError: the folder exists, or a case cannot be serialized.
        BuildError: the disk is full or not writable.
    """
    check_new(folder)
    work = temporary_beside(folder)
    try:
        for case, qpc, reference in members:
            shutil.copytree(qpc, work / case.name / "qpc")
            if (qpc.parent / QPC_PROVENANCE).is_file():
                shutil.copyfile(qpc.parent / QPC_PROVENANCE, work / case.name / QPC_PROVENANCE)
            shutil.copyfile(reference, work / case.name / "reference.safetensors")
        files = digest_tree(work)
        manifest = {
            "schema": SCHEMA,
            "runtime": runtime,
            "cases": [_plain(case, runtime) for case, _, _ in members],
            "files": files,
            "sizes": {name: (work / name).stat().st_size for name in files},
            "environment": dict(environment),
        }
        manifest["digest"] = fingerprint(manifest)
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(work, folder)
    except OSError as exc:
        raise BuildError(f"cannot write the bundle {folder}: {exc.strerror or exc}; nothing was kept") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return str(manifest["digest"])


def read_bundle(folder: Path, *, digest: str | None = None) -> list[Case]:
    """Return the cases of a bundle, with paths of its files as their artifacts.

    Args:
        folder: the bundle.
        digest: the expected digest, as `write_bundle` returned it; None: any that matches the content.

    Raises:
        ConfigError: the folder is no bundle, has another schema, or is for a runtime that opens no QPC.
        Unavailable: a file or the manifest was changed, is missing, was added, or is no regular file; the message names
            it.
    """
    manifest = _manifest(folder)
    if digest is not None and manifest.digest != digest.strip().lower():
        raise Unavailable(f"{folder} has the digest {manifest.digest}, expected was {digest}: it is another bundle")
    if runtime_for(manifest.runtime).kind != "qpc":
        raise ConfigError(f"{folder} is for {manifest.runtime}, which opens no QPC, and a bundle holds nothing else")
    for case in manifest.cases:
        file = case.inputs.file
        if file is not None:
            raise ConfigError(f"{folder}: case {case.name!r} names a {file}, and a bundle holds its texts itself")
    names = [case.name for case in manifest.cases]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{folder}/{MANIFEST} names the cases {names}: at least one is needed, and each once")
    try:
        problems = _differences(folder, manifest)
    except OSError as exc:
        raise Unavailable(f"cannot read {folder}: {exc}") from exc
    if problems:
        raise Unavailable(f"{folder} is not as it was built: {', '.join(problems)}; copy it anew")
    return [_located(case, folder / case.name, manifest.runtime) for case in manifest.cases]


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise ConfigError(f"{folder} is no bundle: {MANIFEST} is missing, or no ordinary file")
        data = json.loads(read_bytes(path, most_bytes=MAX_MANIFEST_BYTES).decode("utf-8"))
        digest = fingerprint({key: value for key, value in dict(data).items() if key != "digest"})
    except (OSError, TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{folder} is no bundle: cannot read its {MANIFEST}: {exc}") from exc
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema is None:
        raise ConfigError(f"{folder} is no bundle: {MANIFEST} is no mapping with a schema")
    if schema != SCHEMA:
        raise ConfigError(f"{folder} is a bundle of schema {schema!r}, this version reads {SCHEMA}: build it anew")
    if data.get("digest") != digest:
        raise Unavailable(f"{folder} is not as it was built: {MANIFEST} changed; copy it anew")
    try:
        return Manifest.model_validate({key: value for key, value in data.items() if key != "schema"})
    except ValidationError as exc:
        raise ConfigError(explain(exc, str(path), data)) from exc


def _differences(folder: Path, manifest: Manifest) -> list[str]:
    """Return the problems of the files. Only files that the manifest lists, with their size there, are opened."""
    problems, missing = [], set(manifest.files)
    for path, problem in folder_entries(folder):
        name = path.as_posix()
        missing.discard(name)
        if problem:
            problems.append(f"{name} {problem}, and a bundle has only files")
        elif name != MANIFEST and not _is_intact(folder / path, manifest.files.get(name), manifest.sizes.get(name)):
            problems.append(f"{name} changed, missing or added")
    return problems + [f"{name} changed, missing or added" for name in sorted(missing)]


def _is_intact(path: Path, digest: str | None, size: int | None) -> bool:
    return digest is not None and path.stat().st_size == size and digest_file(path) == digest


def _plain(case: Case, runtime: str) -> dict[str, Any]:
    update = {"runtimes": [runtime], "artifacts": Artifacts()}
    try:
        plain = case.model_copy(update=update).plain()
        Case.model_validate(json.loads(json.dumps(plain)))
    except ValidationError as exc:
        raise ConfigError(explain(exc, f"case {case.name!r} cannot be written down")) from exc
    except ValueError as exc:
        raise ConfigError(f"case {case.name!r} cannot be written down: {exc}") from exc
    return plain


def _located(case: Case, folder: Path, runtime: str) -> Case:
    artifacts = Artifacts(qpc=str(folder / "qpc"), reference=str(folder / "reference.safetensors"))
    return case.model_copy(update={"artifacts": artifacts, "runtimes": [runtime]})
