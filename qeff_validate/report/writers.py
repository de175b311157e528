# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a report, each by one rename."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qeff_validate.errors import ValidateError
from qeff_validate.files import temporary_beside
from qeff_validate.registry import is_built_in, registered


def write_reports(report: object, folder: Path) -> None:
    """Write a report in every registered form, ``report.json`` and others, as ``report.NAME``.

    A form is an entry point of the group ``qeff_validate.writers``: a function from a
    `report.Report` to text. The built-in ones are written first.

    Raises:
        ValidateError: a file cannot be written, or a function failed; all other files are written.
    """
    built_in_texts, plugin_texts = dict[str, str](), dict[str, str]()
    problems = []
    for entry in registered("writers").values():
        built_in = is_built_in(entry)
        try:
            (built_in_texts if built_in else plugin_texts)[f"report.{entry.name}"] = entry.load()(report)
        except Exception as exc:  # a writer's failure must lose no verdict
            problems.append(f"the report writer {entry.name!r} ({entry.value}) failed: {type(exc).__name__}: {exc}")
    write_texts(folder, {**built_in_texts, **plugin_texts})
    if problems:
        raise ValidateError("; ".join(problems))


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
    for name in registered("writers"):
        with suppress(OSError):
            (folder / f"report.{name}").unlink()


def _replace(path: Path, text: str) -> None:
    temporary = temporary_beside(path)
    try:
        # a lone surrogate, which UTF-8 does not have, becomes its JSON escape
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
