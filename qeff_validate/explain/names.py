# SPDX-License-Identifier: Apache-2.0
"""Paths of modules."""

from __future__ import annotations

from collections.abc import Sequence


def common_module(paths: Sequence[str]) -> str:
    """Return the longest path that several paths begin with.

    Examples:
        >>> common_module(["encoder.layer.1.attention.self", "encoder.layer.1.output"])
        'encoder.layer.1'
    """
    common: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def is_within(path: str, module: str) -> bool:
    """Return True for a module and what is below it."""
    return path == module or path.startswith(f"{module}.")


def numbered(path: str) -> str:
    """Return a path up to its first number, which is the layer; empty if it has none.

    Examples:
        >>> numbered("encoder.layer.1.attention.self")
        'encoder.layer.1'
    """
    parts = path.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])
