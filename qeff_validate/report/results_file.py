# SPDX-License-Identifier: Apache-2.0
"""``results.jsonl``: the results of a run as they are made, one a line, so that none is lost if the run is cut off."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.comparison.verdict import Status
from qeff_validate.errors import ConfigError, IncomparableError, ValidateError
from qeff_validate.files import reason, regular_file, temporary_beside
from qeff_validate.report.result import Result

NAME = "results.jsonl"
"""In the folder of a report."""

MOST_BYTES = 256 << 20
"""A greater file is not read."""


@dataclass(frozen=True, slots=True)
class Line:
    """A result that lies in the file.

    Attributes:
        key: digest of what it was made from: case, code, settings.
        status: of the result.
        start: where the line begins, in bytes.
        length: of the line in bytes.
    """

    key: str
    status: Status
    start: int
    length: int


class ResultsFile:
    """Takes the results of a run, each with what it was made from, and holds none of them in memory.

    The file is new and stays open, so another run in the folder, which has a file of its own, changes nothing here.

    Args:
        folder: of the report.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._descriptor: int | None = None

    def clear(self) -> None:
        """Remove what an earlier run left."""
        self._path.unlink(missing_ok=True)

    def begin(self, entries: Iterable[tuple[str, Result]]) -> list[Line]:
        """Replace what an earlier run left, by one rename.

        Args:
            entries: keys and results to begin with.

        Raises:
            ValidateError: they cannot be written; the earlier file is as it was.
        """
        temporary = temporary_beside(self._path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            lines = [self._append(key, result) for key, result in entries]
            os.replace(temporary, self._path)
        except OSError as exc:
            self._descriptor = None  # what is added later begins a file again
            with suppress(OSError):
                temporary.unlink()
            raise self._unwritten(exc) from exc
        return lines

    def add(self, key: str, result: Result) -> Line:
        """Append a result; it is in the file before this returns.

        Args:
            key: digest of what it was made from: case, code, settings.
            result: one of the run.

        Raises:
            ValidateError: it cannot be written; nothing of it is in the file.
        """
        if self._descriptor is None:
            return self.begin([(key, result)])[0]
        try:
            return self._append(key, result)
        except OSError as exc:
            raise self._unwritten(exc) from exc

    def at(self, line: Line) -> Result:
        """Return the result of a line that `begin`, `add` or `read` returned.

        Raises:
            ConfigError: somebody else has changed the file meanwhile.
        """
        assert self._descriptor is not None
        try:
            return _entry(os.pread(self._descriptor, line.length, line.start))[1]
        except (OSError, *_NO_ENTRY) as exc:
            raise ConfigError(f"{self._path} was changed while it was in use: {reason(exc)}") from exc

    def read(self) -> dict[tuple[str, str], Line]:
        """Return the line of each result by case and runtime; a last line that was cut off is left out.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        if not self._path.is_file():
            raise ConfigError(f"--resume: there is no {self._path}: a run leaves it beside its report")
        found, start = {}, 0
        try:
            if regular_file(self._path).st_size > MOST_BYTES:
                raise OSError(f"it has more than {MOST_BYTES:,} bytes")
            with open(os.dup(self._open(self._path, os.O_RDONLY)), "rb") as file:
                for number, text in enumerate(file, start=1):
                    if text.endswith(b"\n"):  # else it is the last one, cut off
                        try:
                            key, result = _entry(text)
                        except _NO_ENTRY as exc:
                            raise ConfigError(f"--resume: {self._path}, line {number} is no result: {exc}") from exc
                        found[result.case, result.runtime] = Line(key, result.status, start, len(text))
                    start += len(text)
        except OSError as exc:
            raise ConfigError(f"--resume: cannot read {self._path}: {reason(exc)}") from exc
        return found

    def _append(self, key: str, result: Result) -> Line:
        assert self._descriptor is not None
        text = json.dumps({"key": key, "result": result.plain()}, ensure_ascii=False, allow_nan=False) + "\n"
        data, start = text.encode("utf-8", errors="backslashreplace"), os.fstat(self._descriptor).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, start)
            raise
        return Line(key, result.status, start, len(data))

    def _open(self, path: Path, flags: int) -> int:
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor

    def _unwritten(self, exc: OSError) -> ValidateError:
        return ValidateError(f"cannot write {self._path}: {exc.strerror}; choose another directory")


_NO_ENTRY = (ValueError, KeyError, TypeError, RecursionError, IncomparableError)


def _entry(text: bytes) -> tuple[str, Result]:
    """Return key and result of a line."""
    plain: Mapping[str, Any] = json.loads(text.decode("utf-8", errors="replace"))
    if not isinstance(plain["key"], str):
        raise TypeError("its key is no text")
    return plain["key"], Result.from_plain(plain["result"])
