# SPDX-License-Identifier: Apache-2.0
"""A store at a URL: what one host makes another one copies, verified; nothing half-written is taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from store_entries import never, writes

from qeff_validate.artifact import fingerprint
from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import validate
from qeff_validate.errors import BuildError, ConfigError, MissingPackage

KEY = {"a": 1}


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    yield f"file://{tmp_path}/shared" if request.param == "file" else "memory://shared"
    if request.param == "memory":
        memory.rm("/", recursive=True)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Store]:
    """Opens the store of a URL as a host of some name does, whose own directory nobody else sees."""

    def open_store(name: str, url: str) -> Store:
        monkeypatch.setenv("QEFF_VALIDATE_HOME", str(tmp_path / name))
        return Store(url)

    return open_store


def shared_files(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    return {path: files.cat_file(path) for path in files.find(root)}


def test_second_host_copies_what_the_first_one_made(host: Callable[[str, str], Store], url: str) -> None:
    made = host("one", url).entry("onnx", KEY, writes())
    copied = host("two", url).entry("onnx", KEY, never)
    assert made.made
    assert not copied.made
    assert copied.digest == made.digest
    assert copied.path != made.path
    assert (copied.path / "sub" / "file").read_text() == "content"
    assert copied.seconds == made.seconds


def test_entry_that_was_there_before_the_url_was_named_is_handed_on(
    host: Callable[[str, str], Store], url: str, tmp_path: Path
) -> None:
    Store(tmp_path / "one").entry("onnx", KEY, writes())
    host("one", url).entry("onnx", KEY, never)
    host("two", url).entry("onnx", KEY, never)


@pytest.mark.parametrize("damage", ["file changed", "file missing", "provenance cut"])
def test_damaged_entry_is_made_anew_and_replaced(
    host: Callable[[str, str], Store], url: str, damage: str, tmp_path: Path
) -> None:
    host("one", url).entry("onnx", KEY, writes("right"))
    files, _ = fsspec.core.url_to_fs(url)
    stored = {Path(path).name: path for path in shared_files(url)}
    if damage == "file changed":
        files.pipe_file(stored["file"], b"wrong")
    elif damage == "file missing":
        files.rm_file(stored["file"])
    else:
        files.pipe_file(stored["provenance.json"], files.cat_file(stored["provenance.json"])[:40])
    entry = host("two", url).entry("onnx", KEY, writes("right"))
    assert entry.made
    assert (entry.path / "sub" / "file").read_text() == "right"
    host("three", url).entry("onnx", KEY, never)


def test_name_that_leads_out_of_an_entry_is_not_written(host: Callable[[str, str], Store], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    entry = host("one", url).entry("onnx", KEY, writes("right"))
    place = tmp_path / "shared" / "onnx" / entry.path.name
    provenance = json.loads((place / "provenance.json").read_text())
    provenance["files"] = {"../../escaped": provenance["files"]["sub/file"]}
    (place / "provenance.json").write_text(json.dumps(provenance))
    (place / fingerprint(provenance["files"])).mkdir()
    (place / fingerprint(provenance["files"]) / "../../escaped").write_text("right")
    assert host("two", url).entry("onnx", KEY, writes("right")).made
    assert not [path for path in (tmp_path / "two").rglob("*") if path.name == "escaped"]


def test_what_was_there_is_counted(host: Callable[[str, str], Store], url: str) -> None:
    one = host("one", url)
    for key in (KEY, KEY, {"b": 2}):
        one.entry("onnx", key, writes())
    two = host("two", url)
    two.entry("onnx", KEY, never)
    assert (one.hits, two.hits) == (1, 1)


def test_two_hosts_that_made_one_entry_at_once_leave_a_whole_one(host: Callable[[str, str], Store], url: str) -> None:
    def makes_meanwhile(folder: Path) -> None:
        host("two", url).entry("onnx", KEY, writes("of two"))
        writes("of one")(folder)

    one = host("one", url)
    one.entry("onnx", KEY, makes_meanwhile)
    third = host("three", url).entry("onnx", KEY, never)
    assert (third.path / "sub" / "file").read_text() == "of one"


def test_failed_build_leaves_nothing_at_the_url(host: Callable[[str, str], Store], url: str) -> None:
    def fails(folder: Path) -> None:
        writes()(folder)
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        host("one", url).entry("onnx", KEY, fails)
    assert shared_files(url) == {}


def test_url_that_cannot_be_written_is_named(host: Callable[[str, str], Store], tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file")
    with pytest.raises(BuildError, match=f"cannot (read|write) the store file://{tmp_path}/shared: NotADirectoryError"):
        host("one", f"file://{tmp_path}/shared").entry("onnx", KEY, writes())


def test_unknown_protocol_and_missing_package_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--store nowhere://x: Protocol not known: nowhere"):
        Store("nowhere://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackage, match="--store s3://bucket/x: Install s3fs"):
        Store("s3://bucket/x")


def test_case_is_exported_and_measured_on_one_host_alone(host: Callable[[str, str], Store], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    case = Case(
        name="small",
        source="random:bert",
        config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97},
        inputs={"texts": ["a b c", "d e", "the man"]},
        options={"seq_len": [16], "batch_size": 2},
        exporter="torchscript",
        tolerance="table",
        runtimes=["ort"],
    )
    results, provenances = [], []
    for name in ("one", "two"):
        root = host(name, url).root
        results.append(validate(case, store=url).results[0])
        provenances.append({path.parent.name: path.read_text() for path in root.glob("*/*/provenance.json")})
    assert [result.status for result in results] == ["pass", "pass"]
    assert results[0].metrics == results[1].metrics
    assert len(provenances[1]) >= 3, "inputs, reference and graph"
    assert provenances[1].items() <= provenances[0].items(), "their times and durations are those of the first host"
