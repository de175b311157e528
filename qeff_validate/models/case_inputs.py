# SPDX-License-Identifier: Apache-2.0
"""The texts or the pairs of texts that a case names, from the config or from a file. Loads no framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError
from qeff_validate.files import read_lines
from qeff_validate.models.tables import MOST_BYTES, SUFFIXES, read_table
from qeff_validate.models.task_data import read_task_data

LEAST = 3
"""Least number of distinct texts or pairs, which metrics of their order need."""

COLUMNS = ("query", "document")
"""Columns of a file of pairs; others are ignored."""


def texts_of(case: Case, builtin: Sequence[str]) -> list[str]:
    """Return the texts of a case, of both sides of its task data, or the built-in ones.

    Raises:
        ConfigError: the case gives pairs, its file cannot be read, or there are too few distinct texts.
    """
    for name in ("pairs", "pairs_file"):
        if name in case.inputs.given():
            raise ConfigError(
                f"case {case.name!r}: inputs: {name}: the model kind {case.model!r} reads single texts: give texts or"
                " texts_file, or pairs with scores as dataset"
            )
    data = read_task_data(case)
    if data is not None:
        texts = data.texts
    elif case.inputs.texts_file is not None:
        texts = _read_texts(case, Path(case.inputs.texts_file))
    else:
        texts = list(builtin if case.inputs.texts is None else case.inputs.texts)
    if len(set(texts)) < LEAST:
        raise ConfigError(f"case {case.name!r}: at least {LEAST} distinct texts are needed, got {len(set(texts))}")
    return texts


def _read_texts(case: Case, path: Path) -> list[str]:
    if path.suffix in SUFFIXES:
        table, _ = read_table(path, f"case {case.name!r}: texts_file {path}", (("text",),), case.inputs.columns)
        return table.texts("text")
    if case.inputs.columns:
        raise ConfigError(
            f"case {case.name!r}: texts_file {path} has one text per line and no columns: a file with columns ends in"
            f" {', '.join(SUFFIXES)}"
        )
    try:
        texts = read_lines(path, most_bytes=MOST_BYTES)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"case {case.name!r}: cannot read texts_file {path}: {exc}") from exc
    if not texts:
        raise ConfigError(f"case {case.name!r}: texts_file {path} is empty")
    return texts


def pairs_of(case: Case, builtin: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs (query, document) of a case, those of its task data, or the built-in ones.

    Raises:
        ConfigError: the case gives texts, its file has no such columns or cannot be read, or there are too few pairs.
    """
    for name in ("texts", "texts_file"):
        if name in case.inputs.given():
            raise ConfigError(
                f"case {case.name!r}: inputs: {name}: the model kind {case.model!r} reads pairs: give pairs:"
                " [[query, document], …], or pairs_file with columns query and document"
            )
    data = read_task_data(case)
    if data is not None:
        pairs = list(data.pairs)
    elif case.inputs.pairs_file is not None:
        path = Path(case.inputs.pairs_file)
        table, _ = read_table(path, f"case {case.name!r}: pairs_file {path}", (COLUMNS,), case.inputs.columns)
        pairs = list(zip(table.texts("query"), table.texts("document"), strict=True))
    else:
        given = case.inputs.pairs
        pairs = list(builtin) if given is None else [(query, document) for query, document in given]
    if len(set(pairs)) < LEAST:
        raise ConfigError(f"case {case.name!r}: at least {LEAST} distinct pairs are needed, got {len(set(pairs))}")
    return pairs
