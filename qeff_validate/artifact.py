# SPDX-License-Identifier: Apache-2.0
"""What a runtime opens, and the fingerprints that say what a thing is by its content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qeff_validate.files import regular_file

Kind = Literal["module", "onnx", "qpc"]
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A module, an ONNX file or a QPC directory.

    Attributes:
        kind: what it is; a runtime opens one kind.
        path: the ONNX file or the QPC directory; None for a module.
        digest: hex SHA-256 that identifies the content.
        provenance: how it was made: what went in, with versions.
        payload: the in-memory object of a module.
        untrusted: the user brings it: its graph may never end, so it is opened in a process of its own.
        buckets: values of the symbols for which it is used; sizes of retained state that no fed input tells.

    Examples:
        >>> artifact = Artifact("onnx", Path("model.onnx"), digest="0" * 64)
        >>> artifact.kind, artifact.path.name
        ('onnx', 'model.onnx')
    """

    kind: Kind
    path: Path | None
    digest: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    payload: Any = None
    buckets: tuple[Mapping[str, int], ...] = ()
    untrusted: bool = False


def digest_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in pieces of 1 MiB.

    Raises:
        OSError: it cannot be read, or is no regular file: a device never ends, a pipe may block for ever.
    """
    regular_file(path)
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            sha.update(piece)
    return sha.hexdigest()


def digest_files(paths: Iterable[Path], *, root: Path) -> dict[str, str]:
    """Return the digest of each file by its path relative to root, in sorted order."""
    return {path.relative_to(root).as_posix(): digest_file(path) for path in sorted(paths)}


def digest_tree(root: Path, *, suffixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the digests of all files below a directory (those with one of the suffixes, if any are given)."""
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return digest_files((path for path in found if not suffixes or path.suffix in suffixes), root=root)


def fingerprint(value: Any) -> str:
    """Return the hex SHA-256 of plain data in canonical JSON.

    Raises:
        TypeError: the value holds something that JSON cannot say; nothing is hashed by its repr or address.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
