# SPDX-License-Identifier: Apache-2.0
"""The store: whole or absent, verified on every hit, shared by processes, recovered after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qeff_validate.builders.store import PROVENANCE, Store
from qeff_validate.errors import BuildError

KEY = {"a": 1, "b": ["x", None]}


def writes(text: str = "content"):
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)

    return make


def never(folder: Path) -> None:
    raise AssertionError("made again")


def files(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "locks" not in p.parts)


def test_an_entry_is_made_once_and_found_again(tmp_path: Path) -> None:
    first = Store(tmp_path).entry("onnx", KEY, writes())
    again = Store(tmp_path).entry("onnx", KEY, never)
    assert (first.made, again.made) == (True, False)
    assert first.digest == again.digest
    assert first.path == again.path
    provenance = json.loads((first.path / PROVENANCE).read_text())
    assert provenance["key"] == KEY
    assert set(provenance["files"]) == {"sub/file"}


def test_another_key_or_kind_is_another_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    paths = {store.entry(kind, key, writes()).path for kind in ("onnx", "qpc") for key in (KEY, {**KEY, "a": 2})}
    assert len(paths) == 4


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two, three = (store.entry("onnx", {"n": n}, writes(text)) for n, text in enumerate(["x", "x", "y"]))
    assert one.digest == two.digest != three.digest


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "added", "provenance", "other key"])
def test_a_damaged_entry_is_never_served_but_made_again(tmp_path: Path, damage: str) -> None:
    entry = Store(tmp_path).entry("onnx", KEY, writes("right"))
    file, provenance = entry.path / "sub" / "file", entry.path / PROVENANCE
    if damage == "changed":
        file.write_text("wrong")
    elif damage == "cut":
        file.write_text("rig")
    elif damage == "removed":
        file.unlink()
    elif damage == "added":
        (entry.path / "more").write_text("")
    elif damage == "provenance":
        provenance.write_text("{")
    else:
        provenance.write_text(provenance.read_text().replace('"x"', '"z"'))
    again = Store(tmp_path).entry("onnx", KEY, writes("right"))
    assert again.made
    assert file.read_text() == "right"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        Store(tmp_path).entry("onnx", KEY, make)
    assert files(tmp_path) == []
    assert Store(tmp_path).entry("onnx", KEY, writes()).made


def test_a_full_disk_is_a_build_error_that_says_what_to_do(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BuildError, match=r"No space left.*--store"):
        Store(tmp_path).entry("onnx", KEY, make)
    assert files(tmp_path) == []


def test_a_store_in_a_place_that_is_a_file_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot write to the store"):
        Store(tmp_path / "file").entry("onnx", KEY, writes())


def test_tensors_are_stored_and_read_back(tmp_path: Path) -> None:
    made, first = Store(tmp_path).tensors("inputs", KEY, lambda: {"a": np.arange(3)})
    again, second = Store(tmp_path).tensors("inputs", KEY, lambda: never(tmp_path))  # type: ignore[func-returns-value]
    np.testing.assert_array_equal(made["a"], again["a"])
    assert (first.made, second.made) == (True, False)


CHILD = """
import sys, time
from pathlib import Path
from qeff_validate.builders.store import Store
root, mode = Path(sys.argv[1]), sys.argv[2]
def make(folder):
    with open(root / "made", "a") as log: log.write("x")
    (folder / "half").write_text("x")
    (root / f"building-{mode}").write_text("")
    if mode == "hang":
        print("building", flush=True)
        sys.stdin.read()
    (folder / "half").unlink()
    (folder / "file").write_text("content")
print("made" if Store(root / "store").entry("onnx", {"k": 1}, make).made else "found", flush=True)
"""


def child(root: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_make_an_entry_once(tmp_path: Path) -> None:
    with child(tmp_path, "plain") as first, child(tmp_path, "plain") as second:
        said = sorted([first.stdout.read(), second.stdout.read()])
    assert said == ["found\n", "made\n"]
    assert (tmp_path / "made").read_text() == "x"


def test_a_second_process_waits_and_says_so(tmp_path: Path) -> None:
    with child(tmp_path, "hang") as holder:
        assert holder.stdout.readline() == "building\n"
        said = []

        def waiting() -> None:
            said.append("waiting")
            holder.stdin.close()  # let the holder finish only now

        entry = Store(tmp_path / "store").entry("onnx", {"k": 1}, never, waiting=waiting)
    assert said == ["waiting"]
    assert not entry.made


def test_what_a_killed_process_left_is_recovered(tmp_path: Path) -> None:
    with child(tmp_path, "hang") as holder:
        assert holder.stdout.readline() == "building\n"
        os.kill(holder.pid, signal.SIGKILL)
    assert any("tmp" in name for name in files(tmp_path / "store")), "the kill left work behind"
    with child(tmp_path, "plain") as second:
        assert second.stdout.read() == "made\n"
    assert sorted(Path(name).name for name in files(tmp_path / "store")) == ["file", PROVENANCE]


def test_the_place_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QEFF_VALIDATE_HOME", str(tmp_path / "home"))
    assert Store().root == tmp_path / "home"
    assert Store(tmp_path / "other").root == tmp_path / "other"
    monkeypatch.delenv("QEFF_VALIDATE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().root.name == "qeff-validate"


def test_entries_are_listed_by_last_use_and_pruned_by_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = (store.entry("onnx", {"n": n}, writes(str(n))) for n in range(2))
    os.utime(old.path / PROVENANCE, (1000, 1000))
    assert [kept.path for kept in store.entries()] == [old.path, new.path]
    assert all(kept.size > 0 for kept in store.entries())
    gone = store.prune(unused_since=2000)
    assert [kept.path for kept in gone] == [old.path]
    assert not old.path.exists()
    assert store.entry("onnx", {"n": 1}, never).path == new.path
    assert store.entry("onnx", {"n": 0}, writes("0")).made


def test_finding_an_entry_counts_as_use(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("onnx", KEY, writes())
    os.utime(entry.path / PROVENANCE, (1000, 1000))
    store.entry("onnx", KEY, never)
    assert store.prune(unused_since=2000) == []


def test_an_entry_whose_lock_is_held_is_not_pruned(tmp_path: Path) -> None:
    from filelock import FileLock

    store = Store(tmp_path)
    entry = store.entry("onnx", KEY, writes())
    with FileLock(tmp_path / "locks" / f"onnx-{entry.path.name}.lock"):
        assert store.prune(unused_since=float("inf")) == []
    assert len(store.prune(unused_since=float("inf"))) == 1
