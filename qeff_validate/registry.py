# SPDX-License-Identifier: Apache-2.0
"""Entry points by group: runtimes, model kinds, report writers and reporters, ours and those of other packages.

Loads nothing until an entry is asked for, so that pytest can register markers for unrelated tests.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qeff_validate.errors import ConfigError, Unavailable, naming_extras, suggest


@cache
def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of the group ``qeff_validate.<group>`` by name.

    Args:
        group: ``runtimes``, ``models``, ``writers`` or ``reporters``.
    """
    return {entry.name: entry for entry in entry_points(group=f"qeff_validate.{group}")}


def is_built_in(entry: EntryPoint) -> bool:
    """Return True for an entry point of this package, False for one of a plug-in."""
    return entry.value.startswith("qeff_validate.")


def load_entry(group: str, name: str) -> Any:
    """Load one entry point.

    Raises:
        ConfigError: no such name.
        MissingPackage: it needs a package of an extra.
        Unavailable: its import failed otherwise.
    """
    entries = registered(group)
    if name not in entries:
        raise ConfigError(f"no {group.removesuffix('s')} is called {name!r}.{suggest(name, entries)}")
    try:
        with naming_extras():
            return entries[name].load()
    except ImportError as exc:
        raise Unavailable(f"{group.removesuffix('s')} {name!r} cannot be imported: {exc}") from exc
