# SPDX-License-Identifier: Apache-2.0
"""The version of the simulated SDK, read from its version files (card-contract §1.3)."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from xml.etree import ElementTree as ET

VERSIONS = Path(__file__).parent / "versions"


def base_version(image: str = "apps") -> str:
    """Return the first descendant `base_version` of `versions/<image>.xml`, such as 1.22.0.120.

    Args:
        image: ``apps`` or ``platform``.

    Raises:
        RuntimeError: the file has no base_version.
    """
    element = ET.parse(VERSIONS / f"{image}.xml").getroot().find(".//base_version")  # noqa: S314
    if element is None or not element.text:
        raise RuntimeError(f"{VERSIONS / image}.xml has no base_version; reinstall the simulated SDK")
    return element.text.strip()


@functools.cache
def release() -> tuple[int, ...]:
    """Return the version of the runtime as a tuple, for comparison."""
    return tuple(map(int, base_version("platform").split(".")))


def at_least(*version: int) -> bool:
    """Return True if the compiler behaves as that of SDK `version` or newer; QAIC_SIM_COMPILER sets another version."""
    claimed = os.environ.get("QAIC_SIM_COMPILER") or base_version()
    return tuple(int(part) for part in claimed.split(".")) >= version
