# SPDX-License-Identifier: Apache-2.0
"""The store: entries are complete or absent, verified on every hit, shared by processes, and survive a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_entries import never, writes

from qeff_validate.builders import source_keys
from qeff_validate.builders.store import PROVENANCE, Store
from qeff_validate.errors import BuildError

KEY = {"a": 1, "b": ["x", None]}


def files(root: Path) -> list[str]:
    """All files but leases, which are deleted with their store."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "leases" not in p.parts)


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
    first, two, three = (store.entry("onnx", {"n": n}, writes(text)) for n, text in enumerate(["x", "x", "y"]))
    assert first.digest == two.digest != three.digest


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


def wrong_provenance(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        path = entry / PROVENANCE
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def put(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace a file of an entry, or the entry itself."""

    def damage(entry: Path) -> None:
        path = entry / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return damage


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


THINGS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a directory": lambda path: path.symlink_to("/proc"),
    "directory": Path.mkdir,
    "socket": listening,
    "empty file": Path.touch,
    "file of a terabyte": lambda path: path.touch() or os.truncate(path, 10**12),
}
DAMAGES: dict[str, Callable[[Path], None]] = {
    "provenance is a list": wrong_provenance(lambda said: [said]),
    "provenance is null": wrong_provenance(lambda said: None),
    "files is a list": wrong_provenance(lambda said: {**said, "files": list(said["files"])}),
    "no seconds": wrong_provenance(lambda said: {name: said[name] for name in said if name != "seconds"}),
    "seconds is a text": wrong_provenance(lambda said: {**said, "seconds": "1"}),
    "seconds is true": wrong_provenance(lambda said: {**said, "seconds": True}),
    "seconds is infinite": wrong_provenance(lambda said: {**said, "seconds": float("inf")}),
    "seconds is negative": wrong_provenance(lambda said: {**said, "seconds": -1}),
    "key is a list": wrong_provenance(lambda said: {**said, "key": [1]}),
    "too deep": lambda entry: (entry / PROVENANCE).write_text("[" * 10**6) and None,
    "no UTF-8": lambda entry: (entry / PROVENANCE).write_bytes(b"\xff") and None,
    **{f"{place or 'entry'}: {name}": put(place, make) for place in (PROVENANCE, "sub", "sub/file", "more", "")
       for name, make in THINGS.items()},
}  # fmt: skip


del DAMAGES["more: directory"]  # it holds nothing that could be served


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_stands_in_the_place_of_an_entry_is_replaced(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    entry = Store("s").entry("onnx", KEY, writes("right"))
    damage(entry.path)
    Store("s").entries()
    for made in (True, False):
        again = Store("s").entry("onnx", KEY, writes("right"))
        assert again.made is made
        assert (again.path / "sub" / "file").read_text() == "right"
        assert again.seconds >= 0
    assert Path("/dev/zero").exists()
    assert len(Store("s").prune(unused_since=float("inf"))) == 1
    assert files(Path("s")) == []


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_whatever_stands_in_the_place_of_a_lock_is_replaced(
    thing: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = Store("s").entry("onnx", KEY, writes("right"))
    thing(Path("s/locks") / f"onnx-{entry.path.name}.lock")
    assert not Store("s").entry("onnx", KEY, never).made
    assert list(Path("s/locks").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "s"], "no dangling link was followed"


@pytest.mark.parametrize("place", ["onnx", "tmp", "locks", "leases"])
@pytest.mark.parametrize("thing", [name for name in THINGS if name not in ("directory", "link to a directory")])
def test_directory_of_the_store_that_is_none_is_a_build_error_that_names_it(
    place: str, thing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    THINGS[thing](Path("s") / place)
    with pytest.raises(BuildError, match=rf"cannot write to the store .*/{place}.*take away"):
        Store("s").entry("onnx", KEY, writes())


def test_tensors_that_cannot_be_read_are_made_again(tmp_path: Path) -> None:
    make = lambda: {"a": np.arange(3)}  # noqa: E731
    _, entry = Store(tmp_path).tensors("inputs", KEY, make)
    (entry.path / "tensors.safetensors").write_bytes(b"x")
    said = json.loads((entry.path / PROVENANCE).read_text())
    said["files"]["tensors.safetensors"] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    (entry.path / PROVENANCE).write_text(json.dumps(said))
    again, entry = Store(tmp_path).tensors("inputs", KEY, make)
    np.testing.assert_array_equal(again["a"], np.arange(3))
    assert entry.made


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        Store(tmp_path).entry("onnx", KEY, make)
    assert files(tmp_path) == []
    assert Store(tmp_path).entry("onnx", KEY, writes()).made


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=os.strerror)
def test_a_full_disk_is_a_build_error_that_says_what_to_do(number: int, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(number, os.strerror(number))

    with pytest.raises(BuildError, match=rf"{os.strerror(number)}.*--store"):
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
    assert [entry.path for entry in store.entries()] == [old.path, new.path]
    assert all(entry.size > 0 for entry in store.entries())
    deleted = store.prune(unused_since=2000)
    assert [entry.path for entry in deleted] == [old.path]
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


# --- leases ------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from qeff_validate.builders.store import Store
store = Store(sys.argv[1])
entry = store.entry("onnx", {"k": 1}, lambda folder: (folder / "file").write_text("x"))
print(entry.path, flush=True)
sys.stdin.read()
"""


def holder(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_what_a_live_process_has_found_is_not_pruned_until_it_ends(ending: str, tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        path = Path(process.stdout.readline().strip())
        assert Store(tmp_path).prune(unused_since=float("inf")) == []
        assert path.exists()
        if ending == "kill":
            process.kill()
    assert [entry.path for entry in Store(tmp_path).prune(unused_since=float("inf"))] == [path]
    assert files(tmp_path) == []
    assert list((tmp_path / "leases").iterdir()) == []


def test_store_that_prunes_is_not_stopped_by_what_it_has_found_itself(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.entry("onnx", KEY, writes())
    assert len(store.prune(unused_since=float("inf"))) == 1


def test_lease_ends_with_its_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.entry("onnx", KEY, writes())
    assert Store(tmp_path).prune(unused_since=float("inf")) == []
    del store
    assert len(Store(tmp_path).prune(unused_since=float("inf"))) == 1


PRUNER = """
import sys
from qeff_validate.builders.store import Store
sys.stdin.readline()
print(len(Store(sys.argv[1]).prune(unused_since=float("inf"))))
"""


def test_several_prunes_at_once_delete_each_entry_once(tmp_path: Path) -> None:
    for n in range(30):
        Store(tmp_path).entry("onnx", {"n": n}, writes())
    command = [sys.executable, "-c", PRUNER, str(tmp_path)]
    pruners = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for pruner in pruners:
        pruner.stdin.write("\n")
        pruner.stdin.flush()
    done = [pruner.communicate() for pruner in pruners]
    assert "".join(err for _, err in done) == ""
    assert sum(int(out) for out, _ in done) == 30
    assert files(tmp_path) == []


@pytest.mark.parametrize("by", ["prune", "next run"])
def test_what_killed_processes_left_is_taken_away(by: str, tmp_path: Path) -> None:
    with child(tmp_path, "hang") as process:
        assert process.stdout.readline() == "building\n"
        os.kill(process.pid, signal.SIGKILL)
    store = tmp_path / "store"
    remains = [path for name in ("tmp", "locks", "leases") for path in (store / name).iterdir()]
    assert len(remains) == 3
    if by == "prune":
        Store(store).prune(unused_since=0)
    else:
        Store(store).entry("onnx", KEY, writes())
    assert [path for path in remains if path.exists()] == []


def test_unfinished_work_of_a_live_process_is_spared(tmp_path: Path) -> None:
    with child(tmp_path, "hang") as process:
        assert process.stdout.readline() == "building\n"
        Store(tmp_path / "store").prune(unused_since=float("inf"))
        Store(tmp_path / "store").entry("qpc", KEY, writes())
        process.stdin.close()
        assert process.stdout.read() == "made\n"


def test_what_is_not_ours_below_the_root_is_never_deleted(tmp_path: Path) -> None:
    others = [
        "photos/holiday.jpg",
        "photos/2026/a",
        "tmp/mine",
        "locks/x.lock",
        "leases/1",
        "onnx/notes/provenance.json",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    Store(tmp_path).entry("onnx", KEY, writes())
    Store(tmp_path).prune(unused_since=float("inf"))
    assert [name for name in others if not (tmp_path / name).exists()] == []


def test_entry_whose_prune_is_under_way_is_waited_for_and_made_again(tmp_path: Path) -> None:
    from qeff_validate.builders.file_locks import lock

    entry = Store(tmp_path).entry("onnx", KEY, writes())
    held, said = lock(tmp_path / "locks" / f"onnx-{entry.path.name}.lock", lambda: None), []

    def waiting() -> None:
        said.append("waiting")
        shutil.rmtree(entry.path)
        held.close()

    assert Store(tmp_path).entry("onnx", KEY, writes(), waiting=waiting).made
    assert said == ["waiting"]


# --- what code is part of a key ------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package's source, from which the source keys are computed."""
    copy = shutil.copytree(source_keys.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source_keys, "PACKAGE", copy)
    yield copy
    for key in (source_keys.code_key, source_keys.measures_key):
        key.cache_clear()


def keys() -> tuple[str, str]:
    for key in (source_keys.code_key, source_keys.measures_key):
        key.cache_clear()
    return source_keys.code_key(), source_keys.measures_key()


def test_another_message_of_a_judge_rebuilds_no_artifact(package: Path) -> None:
    code, measures = keys()
    for name in source_keys.JUDGES:
        file = package / name
        file.write_text(file.read_text().replace("the", "this", 1))
        assert keys()[0] == code, name
        assert keys()[1] != measures, name
        measures = keys()[1]


def test_another_line_of_what_explains_changes_no_key(package: Path) -> None:
    before = keys()
    for name in (*source_keys.EXPLAINS, "explain/matching.py", "report/explanation.py"):
        with (package / name).open("a") as file:
            file.write("# another line\n")
    assert keys() == before


@pytest.mark.parametrize(
    "name",
    [
        "models/causal_lm/wrapper.py",
        "models/emulation/ensemble.py",
        "builders/export_onnx.py",
        "builders/compiler_inputs.py",
        "builders/onnx_patterns.py",
    ],
)
def test_another_line_of_what_shapes_artifacts_gives_them_another_key(package: Path, name: str) -> None:
    code, measures = keys()
    with (package / name).open("a") as file:
        file.write("# another line\n")
    assert keys()[0] != code
    assert keys()[1] == measures


def test_noise_floor_is_measured_anew_with_another_metric(package: Path) -> None:
    code, measures = keys()
    with (package / "comparison" / "vector_metrics.py").open("a") as file:
        file.write("# another line\n")
    assert keys()[0] == code
    assert keys()[1] != measures
