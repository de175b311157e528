# SPDX-License-Identifier: Apache-2.0
"""The tree under other interpreters and other versions of what it needs, each in an environment of its own.

``make test-sdk`` runs this; it needs a package index. Bindings, compiler and tools all run in the new environment.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dropin.running import check, run_sample

from qeff_validate.cli import main

LOWEST = ["numpy==1.26.4", "onnx==1.18.0", "onnxruntime==1.22.0", "protobuf==5.26.1", "PyYAML"]
NEWEST = ["numpy>=2", "onnx", "onnxruntime", "protobuf", "PyYAML"]
ENVIRONMENTS = [
    ("3.11", LOWEST),
    ("3.11", NEWEST),
    ("3.10", LOWEST),
    ("3.10", NEWEST),
    ("3.12", LOWEST),
    ("3.12", NEWEST),
    ("3.13", NEWEST),
]


def interpreters(version: str) -> Iterator[str]:
    """Where an interpreter of this version may be: on the path, or among those of pyenv."""
    if found := shutil.which(f"python{version}"):
        yield found
    yield from map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))


def interpreter(version: str) -> str:
    """The first that starts and is what its name says; pyenv's shims may stand for nothing."""
    for path in interpreters(version):
        code = "import platform, venv; print(platform.python_version())"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.startswith(f"{version}."):
            return path
    pytest.skip(f"no Python {version} on the path or in ~/.pyenv/versions")


@pytest.mark.slow
@pytest.mark.environments
@pytest.mark.parametrize(
    ("version", "packages"), ENVIRONMENTS, ids=[f"{v}-{'lowest' if p is LOWEST else 'newest'}" for v, p in ENVIRONMENTS]
)
def test_sample_runs_in_an_environment_of_its_own(version: str, packages: list[str], tmp_path: Path) -> None:
    subprocess.run([interpreter(version), "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    prefix = tmp_path / "sdk"
    assert main(["sdk", "install", str(prefix), "--python", str(python)]) == 0
    versions = run_sample(prefix, tmp_path / "work", python=python)
    check(versions, prefix, "1.22.0.120")
    assert versions["python"].startswith(f"{version}.")
    assert versions["numpy"].startswith("1.26." if packages is LOWEST else "2.")
