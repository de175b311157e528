# SPDX-License-Identifier: Apache-2.0
"""Kills, full disks, flipped bits, prunes and other processes: nothing broken is served, nothing is left, and the next
run's verdict is that of a fresh store. `make reliability` does the same with more of each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import random_faults
from forked_children import ForkServer
from random_faults import DISK_SIZES, FILE_SIZES, SIGNALS, STORED, Setting
from warm_cli import WarmCli

pytestmark = pytest.mark.slow

KILLS = [(number, seed) for seed in range(2) for number in SIGNALS]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("faults")
    forks = ForkServer(folder)
    with WarmCli(folder) as cli:
        yield random_faults.prepare(cli, folder / "setting", forks.path)
    forks.end()


@pytest.mark.parametrize(("number", "seed"), KILLS, ids=lambda value: getattr(value, "name", value))
def test_run_that_is_killed_leaves_nothing_that_the_next_is_misled_by(
    number, seed: int, setting: Setting, tmp_path: Path
) -> None:
    moment = random.Random(f"{number}{seed}").uniform(0, setting.seconds)
    assert random_faults.kill(setting, tmp_path, number, moment) == []


@pytest.mark.parametrize("kind", STORED)
def test_flipped_bit_in_a_stored_file_changes_no_verdict(kind: str, setting: Setting, tmp_path: Path) -> None:
    assert random_faults.flip(setting, tmp_path, kind, seed=0) == []


def test_store_that_is_pruned_under_a_run_changes_no_verdict(setting: Setting, tmp_path: Path) -> None:
    assert random_faults.prune(setting, tmp_path) == []


def test_four_processes_on_one_store_have_the_same_verdicts(setting: Setting, tmp_path: Path) -> None:
    assert random_faults.crowd(setting, tmp_path / "crowd") == []


@pytest.mark.parametrize("size", FILE_SIZES)
def test_file_that_may_not_grow_is_an_error_by_name(size: int, setting: Setting, tmp_path: Path) -> None:
    assert random_faults.fill(setting, tmp_path / "small", size, disk=False) == []


@pytest.mark.parametrize("size", DISK_SIZES)
def test_full_disk_is_an_error_by_name(size: int, setting: Setting, tmp_path: Path) -> None:
    if not random_faults.may_mount(tmp_path / "probe"):
        pytest.skip("this user may not mount a tmpfs")
    assert random_faults.fill(setting, tmp_path / "small", size, disk=True) == []
