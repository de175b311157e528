# SPDX-License-Identifier: Apache-2.0
"""What this library raises: always something a person can act on.

    ValidateError
    ├── ConfigError         the question is wrong: a config, an option, an input
    ├── Unavailable         something needed is not here: a package, an SDK, a card, a file
    ├── BuildError          an artifact could not be made: export, compile
    ├── RunError            a runtime refused or failed a run
    └── IncomparableError   nothing valid could be compared
        └── UnstableReferenceError   the original model gives a row other values from run to run

A mismatch is not an exception: it is a `Verdict`. An exception means "could not tell".
Foreign exceptions are translated once, where they enter, with ``raise … from exc``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ValidateError(Exception):
    """The base of every error that this library raises on purpose.

    Attributes:
        stage: where in a run it happened, once the engine knows.
    """

    stage: str | None = None


class ConfigError(ValidateError):
    """The question is wrong: a config file, an option or an input."""


class Unavailable(ValidateError):
    """Something that is needed is not here."""


class BuildError(ValidateError):
    """An artifact could not be built."""


class RunError(ValidateError):
    """A runtime refused a run or failed in it."""


class IncomparableError(ValidateError):
    """There is nothing valid to compare."""


class UnstableReferenceError(IncomparableError):
    """What the original model gives for a row depends on the rows before or beside it, so it is no reference."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
