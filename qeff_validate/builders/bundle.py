# SPDX-License-Identifier: Apache-2.0
"""Bundles: QPCs with their inputs and reference outputs, built on one host and judged on another.

Layout: ``bundle.json`` (runtime, cases, the digest of every file) and, for each case, ``CASE/qpc/programqpc.bin``,
``CASE/about.json`` (what the QPC was made from) and ``CASE/reference.safetensors``. Reading verifies every byte first;
nothing of a changed bundle is judged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qeff_validate.artifact import digest_tree
from qeff_validate.builders.about import BESIDE
from qeff_validate.case import Artifacts, Case, explain
from qeff_validate.errors import BuildError, ConfigError, Unavailable
from qeff_validate.files import temporary_beside

MANIFEST = "bundle.json"
SCHEMA = 1


def write_bundle(
    folder: Path, members: Sequence[tuple[Case, Path, Path]], *, runtime: str, environment: Mapping[str, Any]
) -> None:
    """Write a bundle; the folder appears by one rename.

    Args:
        folder: must not exist yet.
        members: case, QPC directory, recorded reference.
        runtime: for which the QPCs were compiled, ``ai100`` or ``sim``.
        environment: of the host that built them.

    Raises:
        ConfigError: the folder exists, or a case cannot be written down.
        BuildError: the disk is full or may not be written.
    """
    if folder.exists():
        raise ConfigError(f"--bundle: {folder} exists already; name a new directory")
    work = temporary_beside(folder)
    try:
        for case, qpc, reference in members:
            shutil.copytree(qpc, work / case.name / "qpc")
            if (qpc.parent / BESIDE).is_file():
                shutil.copyfile(qpc.parent / BESIDE, work / case.name / BESIDE)
            shutil.copyfile(reference, work / case.name / "reference.safetensors")
        manifest = {
            "schema": SCHEMA,
            "runtime": runtime,
            "cases": [_plain(case, runtime) for case, _, _ in members],
            "files": digest_tree(work),
            "environment": dict(environment),
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(work, folder)
    except OSError as exc:
        raise BuildError(f"cannot write the bundle {folder}: {exc.strerror or exc}; nothing was kept") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_bundle(folder: Path) -> list[Case]:
    """Return the cases of a bundle, with paths to its files.

    Raises:
        ConfigError: it is no bundle, or one of another schema.
        Unavailable: a file is missing, changed or too many; the message names them.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema, files, runtime = manifest["schema"], manifest["files"], manifest["runtime"]
        cases = [Case.model_validate_json(json.dumps(plain)) for plain in manifest["cases"]]
    except ValidationError as exc:
        raise ConfigError(explain(exc, str(folder / MANIFEST))) from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{folder} is no bundle: cannot read its {MANIFEST}: {exc}") from exc
    if schema != SCHEMA:
        raise ConfigError(f"{folder} is a bundle of schema {schema}, this version reads {SCHEMA}")
    found = {name: digest for name, digest in digest_tree(folder).items() if name != MANIFEST}
    wrong = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if wrong:
        raise Unavailable(
            f"{folder} is not as it was built: {', '.join(wrong)} changed, missing or added; copy it anew"
        )
    return [_located(case, folder / case.name, runtime) for case in cases]


def _plain(case: Case, runtime: str) -> dict[str, Any]:
    update = {"runtimes": [runtime], "artifacts": Artifacts()}
    try:
        return case.model_copy(update=update).plain()
    except ValueError as exc:
        raise ConfigError(f"case {case.name!r} cannot be written down: {exc}") from exc


def _located(case: Case, folder: Path, runtime: str) -> Case:
    artifacts = Artifacts(qpc=str(folder / "qpc"), reference=str(folder / "reference.safetensors"))
    return case.model_copy(update={"artifacts": artifacts, "runtimes": [runtime]})
