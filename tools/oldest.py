# SPDX-License-Identifier: Apache-2.0
"""Print constraints that pin every direct dependency to the oldest version that pyproject.toml declares.

``python tools/oldest.py > build/oldest.txt``, then ``make test CONSTRAINTS="--constraint build/oldest.txt"``
with the oldest Python. Needs nothing but the standard library of Python 3.10, so pyproject.toml is read by pattern.
"""

from __future__ import annotations

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LOWER = re.compile(r'"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?>=([0-9.]+)"')
TOOLS = frozenset({"mypy", "ruff", "setuptools"})
"""Linters and the build backend: what they say is no question of the oldest version."""


def oldest(text: str) -> list[str]:
    """Return ``name==version`` for each lower bound, sorted, from the text of pyproject.toml."""
    return sorted({f"{name}=={version}" for name, version in LOWER.findall(text) if name not in TOOLS})


if __name__ == "__main__":
    print("\n".join(oldest(PYPROJECT.read_text(encoding="utf-8"))))
