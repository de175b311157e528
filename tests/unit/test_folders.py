# SPDX-License-Identifier: Apache-2.0
"""Whether a folder can be written to is asked without a trace, so that a kill at that moment leaves none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qeff_validate.errors import ConfigError
from qeff_validate.folders import check_writable


def test_no_folder_is_made_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object, **__: object) -> None:
        raise AssertionError("a folder was made")

    monkeypatch.setattr(os, "mkdir", made)
    check_writable(tmp_path / "new" / "report", "--report")
    check_writable(tmp_path, "--report")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("n" * 300, "File name too long"),
        ("new/" + "n" * 300, "File name too long"),
        ("new/" * 2000, "File name too long"),
        ("a\0b", "null byte"),
        ("file/report", "is no folder"),
        ("link/report", "is a link to nowhere"),
    ],
    ids=["name", "inner name", "path", "NUL", "file", "link"],
)
def test_folder_that_cannot_be_is_refused_with_the_reason(folder: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=reason):
        check_writable(tmp_path / folder, "--report")
