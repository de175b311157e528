# SPDX-License-Identifier: Apache-2.0
"""Reads tables with named columns: ``.csv`` and ``.tsv`` with a header, ``.jsonl`` with an object a line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.files import read_bytes

SUFFIXES = (".tsv", ".csv", ".jsonl")

MOST_BYTES = 64 << 20
"""Maximum size of a file of texts or pairs: the reference runs every one."""


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file, what begins messages about it, and what its columns are called, by what they are for."""

    where: str
    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]

    def texts(self, role: str) -> list[str]:
        """Return the texts of a column.

        Raises:
            ConfigError: a row has no text there.
        """
        values = list(self._values(role))
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str):
                column = self.columns[role]
                raise ConfigError(f"{self.where}: row {number} has no text in the column {column!r}, but {value!r}")
        return [str(value) for value in values]

    def _values(self, role: str) -> Iterator[Any]:
        column = self.columns[role]
        for number, row in enumerate(self.rows, start=1):
            if column not in row:
                found = ", ".join(map(repr, row)) or "none"
                raise ConfigError(f"{self.where}: row {number} has no column {column!r}; its columns are {found}")
            yield row[column]

    def numbers(self, role: str) -> list[float]:
        """Return the numbers of a column.

        Raises:
            ConfigError: a row has no finite number there.
        """
        numbers, column = [], self.columns[role]
        for row, value in enumerate(self._values(role), start=1):
            try:
                number = math.nan if isinstance(value, bool) else float(str(value))
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise ConfigError(f"{self.where}: row {row} has no number in the column {column!r}, but {value!r}")
            numbers.append(number)
        return numbers


def read_table(
    path: Path, where: str, alternatives: Sequence[Sequence[str]], named: Mapping[str, str]
) -> tuple[Table, Sequence[str]]:
    """Read a file that has the columns of one of some alternatives; others are ignored.

    Args:
        path: ends in one of `SUFFIXES`.
        where: begins messages.
        alternatives: columns that go together, by what they are for.
        named: what columns are called in the file, where that is something else.

    Returns:
        The table, and the first alternative that it has.

    Raises:
        ConfigError: the file cannot be read or is empty, a row has more values than the header has columns, a name is
            given for what no alternative reads, or no alternative is there.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{where}: its name must end in .tsv, .csv or .jsonl")
    known = sorted({role for roles in alternatives for role in roles})
    for role in named:
        if role not in known:
            raise ConfigError(f"{where}: columns: no column is read as {role!r}.{suggest(role, known)}")
    try:
        text = read_bytes(path, most_bytes=MOST_BYTES).decode("utf-8-sig")
        rows = list(_json_lines(text) if path.suffix == ".jsonl" else _lines(text, path.suffix))
    except (OSError, ValueError, RecursionError, csv.Error) as exc:
        raise ConfigError(f"{where}: cannot read it: {exc}") from exc
    if not rows:
        raise ConfigError(f"{where}: it is empty: it has no row{'' if path.suffix == '.jsonl' else ' below a header'}")
    columns = {role: named.get(role, role) for role in known}
    found = list(dict.fromkeys(name for row in rows for name in row))
    for roles in alternatives:
        if {columns[role] for role in roles} <= set(found):
            return Table(where, rows, columns), roles
    missing = min(([role for role in roles if columns[role] not in found] for roles in alternatives), key=len)
    wanted = " or ".join(", ".join(repr(columns[role]) for role in roles) for roles in alternatives)
    raise ConfigError(
        f"{where}: there is no column {' and no '.join(repr(columns[role]) for role in missing)}; its columns are"
        f" {', '.join(map(repr, found))}, and wanted are {wanted}: name them so, in a first line or as keys of each"
        f" JSON object, or say columns: {{{missing[0]}: NAME}}"
    )


def _lines(text: str, suffix: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table with a header; quotes have a meaning in CSV only."""
    lines = io.StringIO(text, newline="")
    if suffix == ".tsv":
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(lines, strict=True)
    names = list(rows.fieldnames or ())
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")
    for number, row in enumerate(rows, start=1):
        if None in row:
            values = len(names) + len(row[None])
            remedy = "put a value that holds a comma into quotes" if suffix == ".csv" else "a text must hold no tab"
            raise ValueError(f"row {number} has {values} values, and the header has {len(names)} columns: {remedy}")
        yield row


def _json_lines(text: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise ValueError(f"line {number}: {exc}") from exc
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield row
