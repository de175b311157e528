# SPDX-License-Identifier: Apache-2.0
"""``results.jsonl``: the results of a run as they are made, one a line, so that none is lost if the run is cut off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError, IncomparableError, ValidateError
from qeff_validate.files import read_bytes
from qeff_validate.report.result import Result

NAME = "results.jsonl"
"""In the folder of a report."""

MOST_BYTES = 256 << 20
"""A greater file is not read."""


class ResultsFile:
    """Takes the results of a run, each with what it was made from.

    Args:
        folder: of the report; it is made with the first result.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def clear(self) -> None:
        """Remove what an earlier run left."""
        self._path.unlink(missing_ok=True)

    def add(self, key: str, result: Result) -> None:
        """Append a result; it is on the disk before this returns.

        Args:
            key: digest of what it was made from: case, code, settings.
            result: one of the run.

        Raises:
            ValidateError: it cannot be written.
        """
        line = json.dumps({"key": key, "result": result.plain()}, ensure_ascii=False, allow_nan=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as exc:
            raise ValidateError(f"cannot write {self._path}: {exc.strerror}; choose another directory") from exc

    def read(self) -> dict[tuple[str, str], tuple[str, Result]]:
        """Return key and result by case and runtime; a last line that was cut off is left out.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        if not self._path.is_file():
            raise ConfigError(f"--resume: there is no {self._path}: a run leaves it beside its report")
        lines = read_bytes(self._path, most_bytes=MOST_BYTES).decode("utf-8", errors="replace").split("\n")
        found = {}
        for number, line in enumerate(lines[:-1], start=1):  # a whole line ends with a line break
            try:
                plain = json.loads(line)
                key, result = _entry(plain)
            except (ValueError, KeyError, TypeError, RecursionError, IncomparableError) as exc:
                raise ConfigError(f"--resume: {self._path}, line {number} is no result: {exc}") from exc
            found[result.case, result.runtime] = key, result
        return found


def _entry(plain: Mapping[str, Any]) -> tuple[str, Result]:
    if not isinstance(plain["key"], str):
        raise TypeError("its key is no text")
    return plain["key"], Result.from_plain(plain["result"])
