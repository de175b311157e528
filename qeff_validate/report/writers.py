# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a report, each by one rename."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_validate.errors import ValidateError
from qeff_validate.files import temporary_beside

if TYPE_CHECKING:
    pass
from qeff_validate.report.markdown import markdown


def write_reports(plain: Mapping[str, Any], folder: Path) -> None:
    """Write the files of a report from its plain form.

    Raises:
        ValidateError: they cannot be written.
    """
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_texts(folder, {"report.json": text, "report.md": markdown(plain)})


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by their names into a folder, each by one rename.

    Raises:
        ValidateError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _replace(folder / name, text)
    except OSError as exc:
        raise ValidateError(f"cannot write the report to {folder}: {exc.strerror}; choose another directory") from exc


def remove_reports(folder: Path) -> None:
    """Remove the report of an earlier run, so that nobody takes it for that of a run that ends without one."""
    for name in ("report.json", "report.md"):
        with suppress(OSError):
            (folder / name).unlink()


def _replace(path: Path, text: str) -> None:
    temporary = temporary_beside(path)
    try:
        # a lone surrogate, which UTF-8 does not have, becomes its JSON escape
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
