# SPDX-License-Identifier: Apache-2.0
"""The wheel of this checkout, built offline from a copy, so that nothing is written into the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def package_files() -> list[Path]:
    """Every file of the package."""
    found = (ROOT / "qeff_validate").rglob("*")
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def build_wheel(folder: Path) -> Path:
    """Build the wheel below a folder and return its path."""
    copy = folder / "source"
    for path in (*(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")), *package_files()):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder / "out"), str(copy)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "out").glob("qeff_validate-*.whl")
    return wheel
