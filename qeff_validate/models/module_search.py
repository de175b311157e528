# SPDX-License-Identifier: Apache-2.0
"""Finds a Python module without importing it or its parent packages."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec


def find_module(name: str) -> ModuleSpec | None:
    """Return the spec of a module by its dotted name, None if there is no such module.

    `importlib.util.find_spec` imports the parents of a dotted name, which is unsafe for names from untrusted files. A
    package that changes its ``__path__`` on import is searched as it is on disk.
    """
    spec, places = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:end]), places)
        if spec is None:
            return None
        try:
            places = spec.submodule_search_locations and list(spec.submodule_search_locations)
        except KeyError:  # a namespace package inside another one, which is not imported
            return None
        if places is None and end < len(parts):
            return None
    return spec


def _find(name: str, places: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, places)
        except (ImportError, ValueError, AttributeError):
            continue
        if spec is not None:
            return spec
    return None
