# SPDX-License-Identifier: Apache-2.0
"""Installation of the simulated SDK: what is written, what is never overwritten, and what is removed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sdk_prefix

from qeff_validate.artifact import Artifact
from qeff_validate.cli import main
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.protocols import Settings, runtime
from qeff_validate.runtimes.qaic import QaicRuntime
from qeff_validate.sdk import install
from qeff_validate.sdk.locate import Sdk
from qeff_validate.sdk.simulated.compiler import qaic_exec

PYTHON = Path(sys.executable)
LIBRARY = f"dev/lib/{platform.machine()}/qaicrt"
EXPECTED = {  # where real clients look, card-contract §1.1
    "exec/qaic-compile",
    "tools/qaic-util",
    "tools/qaic-version-util",
    "versions/apps.xml",
    "versions/platform.xml",
    "dev/python/QAicApi_pb2.py",
    f"{LIBRARY}/__init__.py",
}


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path below a folder, with the digest of a file, the target of a link, or an empty text."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            entries[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        else:
            data = path.read_bytes() if path.is_file() else b""
            entries[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest() if path.is_file() else ""
    return entries


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """The prefix of an installed tree."""
    install.install_tree(tmp_path / "sdk", PYTHON)
    return tmp_path / "sdk"


# --- what lies there -------------------------------------------------------------------------------


def test_tree_has_what_clients_look_for_and_declares_itself(prefix: Path) -> None:
    assert set(snapshot(prefix)) >= EXPECTED
    assert not (prefix / "exec" / "qaic-exec").exists()
    for name in ("exec/qaic-compile", "tools/qaic-util", "tools/qaic-version-util"):
        assert (prefix / name).stat().st_mode & 0o777 == 0o755
    assert Sdk(prefix).simulated
    assert Sdk(prefix).versions() == {"apps": "1.22.0.120", "platform": "1.22.0.120"}


def test_tools_start_from_anywhere_and_through_a_link(prefix: Path, tmp_path: Path) -> None:
    link = tmp_path / "qaic-version-util"
    link.symlink_to(prefix / "tools" / "qaic-version-util")
    hostile = tmp_path / "onnx.py"
    hostile.write_text("raise SystemError('the client has an onnx of its own')\n")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "PYTHONHOME": str(tmp_path)}
    for command in ([link, "--apps"], [prefix / "exec" / "qaic-compile", "-version"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "1.22.0.120", "")


def test_adapter_finds_compiler_and_cards_and_refuses_the_bindings(prefix: Path, no_bindings: None) -> None:
    sdk = Sdk(prefix)
    assert sdk.compiler() == ([str(prefix / "exec" / "qaic-compile")], False)
    assert [(card.qid, card.ready, card.free_cores) for card in sdk.query()] == [(0, True, 16)]
    assert "ask for the runtime sim" in str(sdk.why_not())
    qaicrt, messages = sdk.bindings()
    assert qaicrt.SIMULATED is True
    assert messages.IoDesc().SerializeToString() == b""
    opened = QaicRuntime("ai100", sdk).open(Artifact(kind="qpc", path=prefix, digest="", provenance={}))
    with pytest.raises(Unavailable, match="says that it is simulated"), opened:
        pass
    assert runtime("sim", Settings(sdk=str(prefix))).probe() is None


@pytest.fixture
def no_bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test import bindings as if it were the first to do so."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_binding(name)}
    yield
    for name in [name for name in sys.modules if is_binding(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def is_binding(name: str) -> bool:
    return name.partition(".")[0] in ("qaicrt", "QAicApi_pb2")


# --- taking it away --------------------------------------------------------------------------------


def test_remove_leaves_nothing_of_what_install_made(prefix: Path) -> None:
    done = install.remove_tree(prefix)
    assert done.kept == ()
    assert not prefix.exists()
    assert prefix.parent.is_dir()


def test_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    install.install_tree(tmp_path, PYTHON)
    install.remove_tree(tmp_path)
    assert snapshot(tmp_path) == {}


def test_byte_code_of_what_was_laid_down_goes_too_and_other_byte_code_stays(prefix: Path) -> None:
    cache = prefix / LIBRARY / "simulated" / "__pycache__"
    cache.mkdir()
    for name in ("qpc.cpython-310.pyc", "qpc.cpython-312.opt-1.pyc", "other.cpython-310.pyc"):
        (cache / name).touch()
    assert install.remove_tree(prefix).kept == (f"{LIBRARY}/simulated/__pycache__/other.cpython-310.pyc (not ours)",)


def test_changed_and_foreign_files_are_kept_and_named(prefix: Path) -> None:
    (prefix / "versions" / "apps.xml").write_text("<versions/>")
    (prefix / "exec" / "qaic-runner").write_text("mine")
    assert install.remove_tree(prefix).kept == ("versions/apps.xml (changed)", "exec/qaic-runner (not ours)")
    files = {name for name, digest in snapshot(prefix).items() if digest}
    assert files == {"versions/apps.xml", "exec/qaic-runner"}


def test_nothing_behind_a_link_is_deleted(prefix: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (prefix / "exec").rename(elsewhere)
    (prefix / "exec").symlink_to(elsewhere)
    before = snapshot(elsewhere)
    with pytest.raises(ConfigError, match="exec/qaic-compile"):
        install.install_tree(prefix, PYTHON)
    assert "exec/qaic-compile (changed)" in install.remove_tree(prefix).kept
    assert snapshot(elsewhere) == before


@pytest.mark.parametrize("name", ["../victim", "/victim", "exec/../../victim"])
def test_manifest_that_names_something_outside_is_refused(name: str, prefix: Path) -> None:
    manifest = json.loads((prefix / install.MANIFEST).read_text())
    manifest["files"][name] = []
    (prefix / install.MANIFEST).write_text(json.dumps(manifest))
    before = snapshot(prefix)
    with pytest.raises(ConfigError, match="outside"):
        install.remove_tree(prefix)
    assert snapshot(prefix) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [], "folders": []}'])
def test_manifest_that_cannot_be_read_is_an_error_for_both(text: str, prefix: Path) -> None:
    (prefix / install.MANIFEST).write_text(text)
    before = snapshot(prefix)
    for act in (lambda: install.remove_tree(prefix), lambda: install.install_tree(prefix, PYTHON)):
        with pytest.raises(ConfigError, match="cannot be read"):
            act()
    assert snapshot(prefix) == before


def test_remove_where_nothing_was_laid_down_is_an_error(tmp_path: Path) -> None:
    real = sdk_prefix.prefix(tmp_path / "real")
    before = snapshot(real)
    with pytest.raises(ConfigError, match="holds no simulated SDK"):
        install.remove_tree(real)
    assert snapshot(real) == before


# --- what is never overwritten ---------------------------------------------------------------------


def test_real_installation_is_refused_with_its_version(tmp_path: Path) -> None:
    real = sdk_prefix.prefix(tmp_path / "real")
    before = snapshot(real)
    with pytest.raises(ConfigError, match=r"not simulated, version 1\.22\.0\.119"):
        install.install_tree(real, PYTHON)
    assert snapshot(real) == before


def test_real_installation_over_a_tree_is_refused_too(prefix: Path) -> None:
    sdk_prefix.prefix(prefix)
    before = snapshot(prefix)
    with pytest.raises(ConfigError, match=r"exec/qaic-compile.*versions/platform\.xml"):
        install.install_tree(prefix, PYTHON)
    assert snapshot(prefix) == before


def test_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        install.install_tree(tmp_path, PYTHON)
    assert set(snapshot(tmp_path)) == {"notes"}


def test_file_and_missing_parent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no directory"):
        install.install_tree(tmp_path / "file", PYTHON)
    with pytest.raises(ConfigError, match="make it first"):
        install.install_tree(tmp_path / "a" / "b", PYTHON)


# --- upgrades and interruptions --------------------------------------------------------------------


def test_second_install_replaces_what_changed_and_drops_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, now = tmp_path / "sdk", install.contents(PYTHON)
    before = {**now, "dev/gone/away.py": b"old", "versions/apps.xml": b"old"}
    monkeypatch.setattr(install, "contents", lambda *_, **__: before)
    install.install_tree(prefix, PYTHON)
    (prefix / "mine").touch()
    monkeypatch.setattr(install, "contents", lambda *_, **__: now)
    install.install_tree(prefix, PYTHON)
    assert (prefix / "versions" / "apps.xml").read_bytes() == now["versions/apps.xml"]
    assert not (prefix / "dev" / "gone").exists()
    assert install.remove_tree(prefix).kept == ("mine (not ours)",)


@pytest.mark.parametrize("steps", [1, 2, 5, 9], ids=["manifest", "first file", "in between", "manifest again"])
@pytest.mark.parametrize("upgrade", [False, True])
def test_interrupted_install_can_be_removed_or_completed(
    steps: int, upgrade: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: name.encode() for name in EXPECTED}
    older = {**dict.fromkeys(EXPECTED, b"older"), "exec/qaic-exec": b"older"}
    monkeypatch.setattr(install, "contents", lambda *_, old: older if old else few)
    install.install_tree(tmp_path / "whole", PYTHON)
    for name in ("removed", "completed"):
        if upgrade:
            install.install_tree(tmp_path / name, PYTHON, old=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", Failing(steps))
            with pytest.raises(KeyboardInterrupt):
                install.install_tree(tmp_path / name, PYTHON)
        assert list((tmp_path / name).rglob("*.partial")), "what was not finished lies about"
    assert install.remove_tree(tmp_path / "removed").kept == ()
    # before there is a manifest nobody knows who made the folder, so it stays
    assert (tmp_path / "removed").exists() == (steps == 1 and not upgrade)
    assert not any((tmp_path / "removed").glob("*"))
    install.install_tree(tmp_path / "completed", PYTHON)
    completed, expected = snapshot(tmp_path / "completed"), snapshot(tmp_path / "whole")
    assert completed.pop(install.MANIFEST)
    assert expected.pop(install.MANIFEST)
    assert completed == expected


class Failing:
    """`os.replace` that is interrupted at the n-th call."""

    def __init__(self, calls: int) -> None:
        self.left, self.replace = calls, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        self.replace(source, target)


# --- the old manner --------------------------------------------------------------------------------


def test_old_tree_has_the_old_compiler_and_version_and_rejects_named_specializations(
    tmp_path: Path, make_linear
) -> None:
    prefix = tmp_path / "sdk"
    install.install_tree(prefix, PYTHON, old=True)
    assert Sdk(prefix).compiler() == ([str(prefix / "exec" / "qaic-exec")], True)
    assert Sdk(prefix).versions() == {"apps": "1.20.0.0", "platform": "1.20.0.0"}
    (tmp_path / "model.onnx").write_bytes(make_linear().SerializeToString())
    entry = {"name": "Decode", "symbols": {"batch_size": "1"}}
    (tmp_path / "named.json").write_text(json.dumps({"specializations": [entry]}))
    command = [prefix / "exec" / "qaic-exec", "-aic-hw", "-aic-hw-version=2.0", "-compile-only"]
    places = [f"-m={tmp_path}/model.onnx", f"-aic-binary-dir={tmp_path}/qpc"]
    flag = f"-network-specialization-config={tmp_path}/named.json"
    done = subprocess.run([*command, *places, flag], capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert "[json.exception.type_error.302] type must be string, but is object" in done.stderr
    assert not (tmp_path / "qpc").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-aic-hw-version=2.0"], "add -compile-only"),
        (["-compile-only", "-aic-hw-version=ai100"], "use -aic-hw-version=2.0"),
    ],
)
def test_old_compiler_refuses_what_it_would_do_otherwise(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qaic_exec.main(["-aic-hw", *arguments, "-m=a.onnx", "-aic-binary-dir=b"]) == 255
    assert said in capsys.readouterr().err


def test_old_compiler_says_its_version_without_compiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert qaic_exec.main(["-version"]) == 0
    assert capsys.readouterr().out.strip() == "1.22.0.120"


# --- the command line ------------------------------------------------------------------------------


def test_commands_lay_down_and_take_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "sdk"
    assert main(["sdk", "install", str(prefix), "--python", sys.executable]) == 0
    assert f"exec {sys.executable} -E" in (prefix / "exec" / "qaic-compile").read_text()
    (prefix / "mine").touch()
    assert main(["sdk", "remove", str(prefix)]) == 0
    assert "kept mine (not ours)" in capsys.readouterr().out
    assert main(["sdk", "remove", str(prefix)]) == 2
    assert "holds no simulated SDK" in capsys.readouterr().err


def test_interpreter_that_cannot_run_the_compiler_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'onnx'\" >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=r"cannot run the simulated compiler: .*'onnx'"):
        install.interpreter(str(bare))
    with pytest.raises(ConfigError, match="is no program"):
        install.interpreter(str(tmp_path / "none"))
