# SPDX-License-Identifier: Apache-2.0
"""Files of somebody else: kind and size are known before they are read, and lines end where an editor shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qeff_validate.case import Case, Inputs
from qeff_validate.engine import model
from qeff_validate.errors import ConfigError
from qeff_validate.files import read_bytes, read_lines

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"
"""What `str.splitlines` splits at besides."""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.sampled_from("ab" + SEPARATORS), max_size=5).filter(lambda t: not t.endswith("\r")), min_size=1
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_lines_end_with_a_newline_alone(tmp_path: Path, lines: list[str], end: str, last: bool) -> None:
    path = tmp_path / "t"
    path.write_bytes((end.join(lines) + (end if last or not lines[-1] else "")).encode())
    assert read_lines(path, most_bytes=10**6) == lines


def texts_of(path: Path) -> list[str]:
    case = Case(name="a", source="random:bert", inputs=Inputs(texts_file=str(path)))
    return list(model(case).asked()["texts"])  # type: ignore[attr-defined]


def test_texts_of_a_case_are_the_lines_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("red\ngreen\u2028blue\x0bone\nblue\x0c\x85two\n", encoding="utf-8")
    assert texts_of(path) == ["red", "green\u2028blue\x0bone", "blue\x0c\x85two"]


@pytest.mark.parametrize("what", ["device", "pipe", "directory", "huge", "missing", "latin"])
def test_texts_file_that_is_none_is_an_error_that_says_why(what: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    if what == "device":
        path.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "huge":
        with path.open("wb") as file:
            file.truncate(10**12)
    elif what == "latin":
        path.write_bytes(b"\xe4\n")
    words = {
        "device": "a device", "pipe": "a pipe", "directory": "a directory", "huge": "at most 67,108,864",
        "missing": "No such file", "latin": "utf-8",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"texts_file.*{words[what]}"):
        texts_of(path)


def test_file_that_grows_while_it_is_read_is_still_limited(tmp_path: Path) -> None:
    assert read_bytes(Path("/proc/self/status"), most_bytes=10**6), "says that it has no bytes, and has some"
    with pytest.raises(OSError, match="at most 3"):
        read_bytes(Path("/proc/self/status"), most_bytes=3)
