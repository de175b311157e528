# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a report, each by one rename."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path

from qeff_validate.errors import ValidateError
from qeff_validate.files import temporary_beside
from qeff_validate.registry import is_built_in, registered


def write_reports(report: object, folder: Path) -> None:
    """Write a report in every registered form, ``report.json`` and others, as ``report.NAME``.

    A form is an entry point of the group ``qeff_validate.writers``: a function from a
    `report.Report` to text, or to an iterator of its pieces. The built-in ones are written first.

    Raises:
        ValidateError: a file cannot be written, or a function failed; all other files are written.
    """
    problems = []
    for entry in sorted(registered("writers").values(), key=is_built_in, reverse=True):
        try:
            write_texts(folder, {f"report.{entry.name}": _pieces(entry, report)})
        except _WriterError as exc:  # a writer's failure must lose no verdict
            problems.append(str(exc))
    if problems:
        raise ValidateError("; ".join(problems))


class _WriterError(Exception):
    """A report writer failed, with whatever exception; the file system did not."""


def _pieces(entry: EntryPoint, report: object) -> Iterator[str]:
    """Yield the text that a report writer makes, in its pieces."""
    try:
        text = entry.load()(report)
        yield from [text] if isinstance(text, str) else text
    except Exception as exc:
        text = f"the report writer {entry.name!r} ({entry.value}) failed: {type(exc).__name__}: {exc}"
        raise _WriterError(text) from exc


def write_texts(folder: Path, texts: Mapping[str, str | Iterable[str]]) -> None:
    """Write files by their names into a folder, each by one rename.

    Args:
        folder: is made if it does not exist.
        texts: each in one piece, or in several.

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


def _replace(path: Path, text: str | Iterable[str]) -> None:
    temporary = temporary_beside(path)
    try:
        # a lone surrogate, which UTF-8 does not have, becomes its JSON escape
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines([text] if isinstance(text, str) else text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
