# SPDX-License-Identifier: Apache-2.0
"""Edited bundles are refused with the name of the file, without a traceback, a hang or an import."""

from __future__ import annotations

import json
import os
import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.artifact import fingerprint
from qeff_validate.builders.bundle import MANIFEST, check_new, read_bundle, write_bundle
from qeff_validate.config.case import Artifacts, Case, Expect, Inputs
from qeff_validate.engine import model
from qeff_validate.errors import ConfigError, Unavailable, ValidateError

PLAIN = Case(name="b", source="random:bert")
EXPECT = Expect(runtime="sim", status="fail", reason="bug 1", until=date.today() + timedelta(days=9))
CASES = {
    "plain": PLAIN,
    "expected failure": PLAIN.model_copy(update={"expect": [EXPECT]}),
    "own bounds": PLAIN.model_copy(update={"tolerance": {"sim": {"rel_l2": 1e-3, "why": "measured"}}}),
    "texts": PLAIN.model_copy(update={"inputs": Inputs(texts=["a", "é\u2028", "c"]), "marks": ["slow"]}),
    "own pooling": PLAIN.model_copy(update={"options": {"pooling": "evilpkg.sub:f", "seq_len": [16, 32]}}),
}


def built(folder: Path, case: Case = PLAIN) -> tuple[Path, str]:
    """Write a bundle whose files no runtime could open."""
    qpc = folder / "entry" / "qpc"
    qpc.mkdir(parents=True)
    (qpc / "programqpc.bin").write_bytes(b"program")
    (folder / "r.safetensors").write_bytes(b"tensors")
    members = [(case, qpc, folder / "r.safetensors")]
    return folder / "B", write_bundle(folder / "B", members, runtime="sim", environment={"cpus": 2})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return built(tmp_path)[0]


def edit(bundle: Path, change: Any, *, sealed: bool) -> None:
    """Change the manifest, and optionally recompute its digest."""
    plain = json.loads((bundle / MANIFEST).read_text())
    change(plain)
    if sealed:
        plain["digest"] = fingerprint({key: value for key, value in plain.items() if key != "digest"})
    (bundle / MANIFEST).write_text(json.dumps(plain))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_comes_back_as_it_was(case: Case, tmp_path: Path) -> None:
    folder, digest = built(tmp_path, case)
    (read,) = read_bundle(folder, digest=digest.upper())
    assert read.model_copy(update={"artifacts": Artifacts(), "runtimes": case.runtimes}) == case
    assert read.runtimes == ["sim"]


def test_another_bundle_than_expected_is_refused(tmp_path: Path) -> None:
    folder, digest = built(tmp_path)
    edit(folder, lambda plain: plain["cases"][0].update(tolerance="table"), sealed=True)
    read_bundle(folder)
    with pytest.raises(Unavailable, match=f"expected was {digest}: it is another bundle"):
        read_bundle(folder, digest=digest)


@pytest.mark.parametrize("key", ["schema", "runtime", "cases", "files", "sizes", "environment", "digest"])
def test_each_part_of_the_manifest_is_covered_by_its_digest(bundle: Path, key: str) -> None:
    other = {"runtime": "torch", "cases": [], "files": {}, "sizes": {}, "environment": {}, "digest": "0" * 64}
    other["schema"] = 1
    edit(bundle, lambda plain: plain.update({key: other[key]}), sealed=False)
    with pytest.raises(ValidateError, match=f"{MANIFEST} changed" if key != "schema" else "schema 1"):
        read_bundle(bundle)


SEALED = {
    "files null": ({"files": None}, "files: Input should be a valid dictionary"),
    "files list": ({"files": [1]}, "files: Input should be a valid dictionary"),
    "digests numbers": ({"files": {"b/reference.safetensors": 3}}, "files.b/reference.safetensors: "),
    "sizes null": ({"sizes": None}, "sizes: Input should be a valid dictionary"),
    "sizes texts": ({"sizes": {"b/reference.safetensors": "7"}}, "sizes.b/reference.safetensors: "),
    "runtime number": ({"runtime": 3}, "runtime: Input should be a valid string"),
    "runtime unknown": ({"runtime": "simm"}, "Did you mean 'sim'?"),
    "runtime torch": ({"runtime": "torch"}, "torch, which opens no QPC"),
    "runtime ort": ({"runtime": "ort"}, "ort, which opens no QPC"),
    "no cases": ({"cases": []}, "at least one is needed"),
    "cases null": ({"cases": None}, "cases: Input should be a valid list"),
    "the same case twice": ({"cases": [PLAIN.plain(), PLAIN.plain()]}, "each once"),
    "a name that climbs": ({"cases": [{**PLAIN.plain(), "name": "../b"}]}, "cases[0].name"),
    "a file outside": ({"cases": [{**PLAIN.plain(), "inputs": {"texts_file": "/dev/zero"}}]}, "names a texts_file"),
    "a mark": ({"cases": [{**PLAIN.plain(), "marks": ["xfail"]}]}, "would decide whether a test counts"),
    "schema 1": ({"schema": 1}, "build it anew"),
    "schema list": ({"schema": [3]}, "build it anew"),
}


@pytest.mark.parametrize(("update", "message"), SEALED.values(), ids=SEALED)
def test_a_manifest_of_another_form_is_a_config_error(bundle: Path, update: dict[str, Any], message: str) -> None:
    edit(bundle, lambda plain: plain.update(update), sealed=True)
    with pytest.raises(ConfigError) as caught:
        read_bundle(bundle)
    assert message in str(caught.value)
    assert str(bundle) in str(caught.value) or "Did you mean" in message


@pytest.mark.parametrize(
    "raw",
    [b"", b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b"3", b"null", b'"x"', b'{"schema": 3}',
     b'{"schema": ' + b"9" * 5000 + b"}", b'{"schema": 3, "files": {"\\ud800": "x"}}'],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_manifest_is_an_error_of_ours(bundle: Path, raw: bytes) -> None:
    (bundle / MANIFEST).write_bytes(raw)
    with pytest.raises(ValidateError, match=r"is no bundle|bundle\.json changed|build it anew"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["b/z", "b/qpc/programqpc.bin", MANIFEST])
@pytest.mark.parametrize("target", ["/nowhere", "/dev/zero", "/etc", "a pipe", "its own content"])
def test_links_and_what_is_no_file_are_refused_by_name_and_never_opened(bundle: Path, name: str, target: str) -> None:
    path = bundle / name
    if target == "its own content":
        (bundle.parent / "copy").write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    if target == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(bundle.parent / "copy" if target == "its own content" else target)
    with pytest.raises(ValidateError) as caught:
        read_bundle(bundle)
    assert name in str(caught.value)


def test_file_of_another_size_is_named_and_not_read(bundle: Path) -> None:
    os.truncate(bundle / "b" / "reference.safetensors", 10**12)
    with pytest.raises(Unavailable, match=r"b/reference\.safetensors changed"):
        read_bundle(bundle)


def test_nothing_that_a_bundle_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "evilpkg"
    package.mkdir(parents=True)
    for name in ("__init__", "sub"):
        (package / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef f(h, m): return h[:, 0]\n")
    monkeypatch.syspath_prepend(package.parent)
    (case,) = read_bundle(built(tmp_path, CASES["own pooling"])[0])
    made: Any = model(case)
    assert len(made.settings()["head"]["code"]) == 64, "known by its source all the same"
    data = model(PLAIN.model_copy(update={"source": "package:evilpkg.sub/model"}))
    with pytest.raises(ValidateError, match="package:evilpkg"):
        data.fingerprint()
    assert not (tmp_path / "executed").exists()
    assert "evilpkg" not in sys.modules


@pytest.mark.parametrize("name", ["file", "file/below", "file/a/b", "x" * 300, "x" * 300 + "/y", "nul\0", "link", "."])
def test_places_that_cannot_hold_a_bundle_are_known_before_any_build(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--bundle: "):
        check_new(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_place_that_can_hold_one_is_left_as_it_is(tmp_path: Path) -> None:
    check_new(tmp_path / "deep" / "er")
    assert list(tmp_path.iterdir()) == []
