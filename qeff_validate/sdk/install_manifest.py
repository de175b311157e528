# SPDX-License-Identifier: Apache-2.0
"""The manifest of an installed simulated SDK: which files `sdk install` wrote, and with which content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qeff_validate.errors import ConfigError

MANIFEST = "simulated-sdk.json"
"""Name of the manifest below the prefix."""

PARTIAL = ".partial"
"""Suffix of a file that is being written."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The installed files.

    Attributes:
        files: the digests that each file may have, by its path relative to the prefix.
        folders: the directories that were created for them.
    """

    files: Mapping[str, tuple[str, ...]]
    folders: tuple[str, ...]


def write_manifest(prefix: Path, manifest: Manifest) -> None:
    """Write the manifest of a prefix.

    Raises:
        OSError: it cannot be written.
    """
    plain = {"format": 1, "simulated": True, "folders": manifest.folders, "files": manifest.files}
    write_file(prefix / MANIFEST, (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(prefix: Path) -> Manifest | None:
    """Read the manifest of a prefix; None if there is none.

    Raises:
        ConfigError: it cannot be read, or names a path outside of the prefix.
    """
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


def write_file(path: Path, data: bytes, *, executable: bool = False) -> None:
    """Write a file; it gets its name only when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    partial.chmod(0o755 if executable else 0o644)
    os.replace(partial, path)
