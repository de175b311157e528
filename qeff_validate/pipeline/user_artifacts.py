# SPDX-License-Identifier: Apache-2.0
"""Artifacts that the user brings, checked and identified by their content before anything opens them."""

from __future__ import annotations

import os
from pathlib import Path

from qeff_validate.artifact import Artifact, Kind, fingerprint
from qeff_validate.builders.external_data import external_files
from qeff_validate.builders.graph_size import check_graph
from qeff_validate.builders.provenance import QPC_PROVENANCE
from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError
from qeff_validate.models.sources.checkpoint import checked, digests

MOST_PROGRAM = 128 << 30
"""Bytes of a compiled program: no card has so much memory."""


def user_artifact(case: Case, kind: Kind, path: Path) -> Artifact:
    """Return an artifact that the user brings, identified by the content of all its files.

    Raises:
        ConfigError: a file is missing, no regular file, or named by the ONNX file outside of its directory.
        BuildError: it is an ONNX file that cannot be read, or becomes too large when it is opened.
    """
    main = path if kind == "onnx" else path / "programqpc.bin"
    where = f"case {case.name!r}: artifacts.{kind}"
    if not os.path.lexists(main):
        raise ConfigError(f"{where}: there is no file {main}")
    try:
        checked([main])
        if kind == "onnx":
            check_graph(path)
        files = [main, *external_files(path)] if kind == "onnx" else checked(qpc_files(path), most_bytes=MOST_PROGRAM)
        digest = fingerprint(digests(files, path.parent))
        return Artifact(kind, path, digest, {"given": str(path)}, untrusted=True)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def qpc_files(path: Path) -> list[Path]:
    """Return all files of a QPC's directory, and what stands beside it."""
    beside = path.parent / QPC_PROVENANCE
    return [*(entry for entry in path.rglob("*") if not entry.is_dir()), *([beside] if os.path.lexists(beside) else [])]
