# SPDX-License-Identifier: Apache-2.0
"""A client that knows the tree alone, in this interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

from dropin.running import check, run_sample

from qeff_validate.sdk import install


def test_sample_runs_on_a_tree(tmp_path: Path) -> None:
    prefix = tmp_path / "a prefix"
    install.install_tree(prefix, Path(sys.executable))
    check(run_sample(prefix, tmp_path / "work"), prefix, "1.22.0.120")


def test_sample_of_the_old_manner_runs_on_an_old_tree(tmp_path: Path) -> None:
    prefix = tmp_path / "sdk"
    install.install_tree(prefix, Path(sys.executable), old=True)
    check(run_sample(prefix, tmp_path / "work", "--old"), prefix, install.OLD_VERSION)
