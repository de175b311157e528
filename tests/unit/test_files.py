# SPDX-License-Identifier: Apache-2.0
"""Files of somebody else: kind and size are known before they are read, and lines end where an editor shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qeff_validate.config.case import Case, Inputs
from qeff_validate.engine import model
from qeff_validate.errors import ConfigError
from qeff_validate.files import read_bytes, read_lines, temporary_beside, temporary_folder

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


# --- temporary names -----------------------------------------------------------------------------------------

HOLDER = """
import sys
from qeff_validate.files import temporary_folder
with temporary_folder() as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_temporary_folder_of_a_dead_process_is_deleted_by_the_next(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "qeff-validate-work-file").write_text("no folder")
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        with temporary_folder() as own:
            assert held.parent == own.parent == tmp_path
            assert (held / "file").exists()
        if ending == "kill":
            process.kill()
    assert held.exists() is (ending == "kill")
    with temporary_folder() as own:
        assert sorted(tmp_path.iterdir()) == sorted([own, tmp_path / "qeff-validate-work-file"])


def test_names_beside_a_path_that_dead_processes_left_are_deleted(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    dead, living = tmp_path / f".r[1].json.{process.pid}", tmp_path / f".r[1].json.{os.getppid()}"
    others = [living, tmp_path / ".r[1].json.bak", tmp_path / f".r1.json.{process.pid}", tmp_path / "r[1].json"]
    others += [tmp_path / f".r[1].json.{10**30}"]
    dead.mkdir()
    (dead / "file").write_text("x")
    for path in others:
        path.write_text("x")
    assert temporary_beside(tmp_path / "r[1].json") == tmp_path / f".r[1].json.{os.getpid()}"
    assert sorted(tmp_path.iterdir()) == sorted(others)
