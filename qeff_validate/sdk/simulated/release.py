# SPDX-License-Identifier: Apache-2.0
"""The version that the simulated SDK claims, read from its version files (qaic-contract §1.3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

VERSIONS = Path(__file__).parent / "versions"
# The last whose compiler is qaic-exec, as far as is known (qaic-contract §2.9).
QAIC_EXEC = "1.20.0"


def base_version(image: str = "apps") -> str:
    """Returns the first descendant `base_version` of `versions/<image>.xml`, such as 1.22.0.120."""
    element = ET.parse(VERSIONS / f"{image}.xml").getroot().find(".//base_version")  # noqa: S314
    if element is None or not element.text:
        raise RuntimeError(f"{VERSIONS / image}.xml has no base_version; reinstall the simulated SDK")
    return element.text.strip()


def at_least(*version: int) -> bool:
    """Tells whether the compiler behaves as that of SDK `version` or newer; QAIC_SIM_COMPILER claims another one."""
    claimed = os.environ.get("QAIC_SIM_COMPILER") or base_version()
    return tuple(int(part) for part in claimed.split(".")) >= version


@contextmanager
def claiming(version: str | None) -> Iterator[None]:
    """Lets the compiler be of another version, unless QAIC_SIM_COMPILER says one already; None changes nothing.

    `exec/qaic-exec` of the drop-in tree is `compiler.main(argv, release=QAIC_EXEC)`.
    """
    if version is None or os.environ.get("QAIC_SIM_COMPILER"):
        yield
        return
    os.environ["QAIC_SIM_COMPILER"] = version
    try:
        yield
    finally:
        del os.environ["QAIC_SIM_COMPILER"]
