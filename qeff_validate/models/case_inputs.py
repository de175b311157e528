# SPDX-License-Identifier: Apache-2.0
"""The texts or the pairs of texts that a case names, from the config or from a file. Loads no framework."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError
from qeff_validate.files import read_bytes, read_lines

MOST_BYTES = 64 << 20
"""Maximum size of a file of texts or pairs: the reference runs every one."""

LEAST = 3
"""Least number of distinct texts or pairs, which metrics of their order need."""

COLUMNS = ("query", "document")
"""Columns of a file of pairs; others are ignored."""


def texts_of(case: Case, builtin: Sequence[str]) -> list[str]:
    """Return the texts of a case, or the built-in ones.

    Raises:
        ConfigError: the case gives pairs, its file cannot be read, or there are too few distinct texts.
    """
    for name in ("pairs", "pairs_file"):
        if name in case.inputs.given():
            raise ConfigError(
                f"case {case.name!r}: inputs: {name}: the model kind {case.model!r} reads single texts: give texts or"
                " texts_file"
            )
    if case.inputs.texts_file is not None:
        path = Path(case.inputs.texts_file)
        try:
            texts = read_lines(path, most_bytes=MOST_BYTES)
        except (OSError, ValueError) as exc:
            raise ConfigError(f"case {case.name!r}: cannot read texts_file {path}: {exc}") from exc
    else:
        texts = list(builtin if case.inputs.texts is None else case.inputs.texts)
    if len(set(texts)) < LEAST:
        raise ConfigError(f"case {case.name!r}: at least {LEAST} distinct texts are needed, got {len(set(texts))}")
    return texts


def pairs_of(case: Case, builtin: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs (query, document) of a case, or the built-in ones.

    Raises:
        ConfigError: the case gives texts, its file has no such columns or cannot be read, or there are too few pairs.
    """
    for name in ("texts", "texts_file"):
        if name in case.inputs.given():
            raise ConfigError(
                f"case {case.name!r}: inputs: {name}: the model kind {case.model!r} reads pairs: give pairs:"
                " [[query, document], …], or pairs_file with columns query and document"
            )
    if case.inputs.pairs_file is not None:
        pairs = _read_pairs(Path(case.inputs.pairs_file), f"case {case.name!r}: pairs_file {case.inputs.pairs_file}")
    else:
        given = case.inputs.pairs
        pairs = list(builtin) if given is None else [(query, document) for query, document in given]
    if len(set(pairs)) < LEAST:
        raise ConfigError(f"case {case.name!r}: at least {LEAST} distinct pairs are needed, got {len(set(pairs))}")
    return pairs


def _read_pairs(path: Path, where: str) -> list[tuple[str, str]]:
    readers = {".csv": _table, ".tsv": _table, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise ConfigError(f"{where}: its name must end in .tsv, .csv or .jsonl")
    try:
        text = read_bytes(path, most_bytes=MOST_BYTES).decode("utf-8-sig")
        rows = list(readers[path.suffix](text, path.suffix))
    except (OSError, ValueError, RecursionError, csv.Error) as exc:
        raise ConfigError(f"{where}: cannot read it: {exc}") from exc
    pairs = []
    for number, row in enumerate(rows, start=1):
        values = [row.get(column) for column in COLUMNS]
        for column, value in zip(COLUMNS, values, strict=True):
            if not isinstance(value, str):
                found = ", ".join(map(repr, row)) or "none"
                raise ConfigError(
                    f"{where}: row {number} has no text in the column {column!r} (its columns: {found}): name the"
                    " columns query and document, in a first line or as keys of each JSON object"
                )
        pairs.append((str(values[0]), str(values[1])))
    return pairs


def _table(text: str, suffix: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table with a header; quotes have a meaning in CSV only."""
    lines = io.StringIO(text, newline="")
    if suffix == ".tsv":
        yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        yield from csv.DictReader(lines, strict=True)


def _json_lines(text: str, suffix: str) -> Iterator[Mapping[str, Any]]:  # noqa: ARG001
    for number, line in enumerate(filter(None, text.split("\n")), start=1):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield row
