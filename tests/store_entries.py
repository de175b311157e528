# SPDX-License-Identifier: Apache-2.0
"""What tests of the store put into an entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def writes(text: str = "content") -> Callable[[Path], None]:
    """Return what makes an entry with one file in a folder."""

    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)

    return make


def never(folder: Path) -> None:
    """Fail: the entry should have been found."""
    raise AssertionError(f"made again in {folder}")
