# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.errors import ConfigError, suggest

if TYPE_CHECKING:
    from qeff_validate.config.case import Case

EPILOG = (
    "Exit codes: 0 everything asked for agrees · 1 a mismatch or an inconclusive result · 2 wrong usage or config · "
    "3 an error, a required runtime that did not run, or nothing compared · 130 interrupted."
)

Configs = Annotated[list[Path], typer.Argument(help="YAML config files", metavar="CONFIG…")]
CaseNames = Annotated[list[str] | None, typer.Option("--case", help="run only this case; repeatable")]
SdkPrefix = Annotated[
    str | None, typer.Option("--sdk", help="prefix of the AI 100 SDK (default: QEFF_VALIDATE_SDK, /opt/qti-aic)")
]
StoreDir = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="artifact store: a directory, or an fsspec URL such as s3://… (default: QEFF_VALIDATE_HOME, user cache)",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="stream the compiler's output; tell what starts and what is taken from the store"
    ),
]


def select_cases(cases: list[Case], names: list[str]) -> list[Case]:
    """Return the cases with these names; all cases if there are no names.

    Raises:
        ConfigError: no case has one of the names.
    """
    known = [case.name for case in cases]
    for name in names:
        if name not in known:
            raise ConfigError(f"--case: no case is called {name!r}.{suggest(name, known)}")
    return [case for case in cases if not names or case.name in names]


def matching_cases(cases: list[Case], pattern: str | None) -> list[Case]:
    """Return the cases whose name contains a text, or matches it if it has ``*`` or ``?``; all if there is none.

    Raises:
        ConfigError: no name fits.
    """
    if pattern is None:
        return cases
    glob = pattern if set(pattern) & set("*?") else f"*{pattern}*"
    fitting = [case for case in cases if fnmatchcase(case.name, glob)]
    if not fitting:
        raise ConfigError(f"-k {pattern!r} fits none of the cases {', '.join(case.name for case in cases)}")
    return fitting


def split_list(text: str) -> list[str]:
    """Return the non-empty items of a comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]


def runtime_names(text: str | None) -> list[str] | None:
    """Parse ``--runtimes``; None if it was not given.

    Raises:
        ConfigError: it names none.
    """
    names = None if text is None else split_list(text)
    if names == []:
        raise ConfigError("--runtimes names no runtime")
    return names


def device_ids(text: str) -> tuple[int, ...]:
    """Parse ``--device-ids``.

    Raises:
        ConfigError: an item is not a card id.
    """
    for item in split_list(text):
        if not item.isdecimal() or len(item) > 9:
            raise ConfigError(f"--device-ids: {item[:40]!r} is no card id; give numbers such as 0,1")
    return tuple(int(item) for item in split_list(text))


def required_runtimes(text: str) -> list[str]:
    """Parse ``--require``.

    Raises:
        ConfigError: an item is not the name of a registered runtime.
    """
    from qeff_validate.registry import registered

    known, names = registered("runtimes"), split_list(text)
    for name in names:
        if name not in known:
            raise ConfigError(f"--require: no runtime is called {name!r}.{suggest(name, known)}")
    return names


def shard(cases: list[Case], text: str | None) -> list[Case]:
    """Return each N-th case, from the K-th on, of ``--shard K/N``; all cases if there is no text.

    Raises:
        ConfigError: it is no K/N with 1 <= K <= N, or this shard has no case.
    """
    if text is None:
        return cases
    number, slash, count = text.partition("/")
    known = slash and number.isdecimal() and count.isdecimal() and len(text) <= 20
    if not known or not 1 <= int(number) <= int(count):
        raise ConfigError(f"--shard: {text[:40]!r} is no share: give K/N with K from 1 to N, such as 3/8")
    chosen = cases[int(number) - 1 :: int(count)]
    if not chosen:
        raise ConfigError(f"--shard {text}: there are {len(cases)} cases, so this share has none: give a smaller N")
    return chosen
