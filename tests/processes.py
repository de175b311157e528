# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line as a real process, on one small case whose artifacts are built once a session."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from warm_cli import WarmCli, WarmProcess

DEADLINE_S = 60
"""When waiting for an event is given up; far beyond what any of them takes."""

SMALL_BERT = """\
    source: random:bert
    config: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 37, vocab_size: 97}
    inputs: {texts: ["a b c", "d e", "the man"]}
    options: {seq_len: [16], batch_size: 2}
"""


def case(name: str = "tiny", extra: str = "") -> str:
    """A case of a config; ``extra`` is further lines of YAML without indentation."""
    lines = "".join(f"    {line}\n" for line in extra.splitlines())
    return f"  - name: {name}\n{SMALL_BERT}{lines}"


def config(folder: Path, *cases: str) -> Path:
    path = folder / "cases.yaml"
    path.write_text("cases:\n" + "".join(cases or [case()]), encoding="utf-8")
    return path


def environ(folder: Path) -> dict[str, str]:
    """The environment of a run: no SDK of this machine, whichever there may be."""
    return {**os.environ, "QEFF_VALIDATE_SDK": str(folder / "no-sdk"), "COLUMNS": "200", "NO_COLOR": "1"}


@functools.cache
def _warm_cli() -> WarmCli:
    from warm_cli import WarmCli  # it imports this module

    kept = ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(WarmCli(Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="warm-cli-")))))


def start(*arguments: str | Path, cwd: Path, stderr: Path | None = None) -> WarmProcess:
    """Start the command line in a session of its own, so that a signal to it reaches nothing else.

    It is a fork of a process that has imported torch already; `cli_from_the_start` imports all itself.

    Args:
        arguments: of the command line.
        cwd: where.
        stderr: a file, for a test that reads along.
    """
    from warm_cli import WarmProcess

    return WarmProcess(_warm_cli(), *arguments, cwd=cwd, variables=environ(cwd), err=stderr)


def cli(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return finish(start(*arguments, cwd=cwd))


def cli_from_the_start(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end in an interpreter of its own, with what it imports on the way."""
    command = [sys.executable, "-m", "qeff_validate.cli", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environ(cwd),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE_S,
        check=False,
    )


def forked_pytest(pytester: pytest.Pytester, *arguments: str | Path, timeout: float = 240) -> pytest.RunResult:
    """Run pytest like `pytest.Pytester.runpytest_subprocess`, but in a fork of the process that has imported torch."""
    import pytest  # scripts without it use this module too

    out, err = (pytester.path / name for name in ("forked-out", "forked-err"))
    folder = tempfile.mkdtemp(prefix="runpytest-", dir=pytester.path)
    options = (f"--basetemp={folder}", "-p", "no:hypothesispytest")
    start, cli = time.monotonic(), _warm_cli()
    pid = cli.fork(
        *options, *arguments, cwd=pytester.path, variables=dict(os.environ), out=out, err=err, program="pytest"
    )
    code = cli.end(pid, timeout)["code"]
    assert code is not None, f"pytest took more than {timeout} s"
    lines = [path.read_text(encoding="utf-8").splitlines() for path in (out, err)]
    return pytest.RunResult(code, *lines, time.monotonic() - start)


def finish(process: WarmProcess) -> subprocess.CompletedProcess[str]:
    with ended(process):
        out, err = process.communicate(timeout=4 * DEADLINE_S)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def ended(process: subprocess.Popen[str] | WarmProcess) -> Iterator[None]:
    """Leave nothing running behind, whatever a test finds."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def said(done: subprocess.CompletedProcess[str]) -> str:
    """All that a process said, with runs of whitespace and the frames of tables made one space."""
    return " ".join((done.stdout + (done.stderr or "")).translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())


def until(happened: Callable[[], Any], what: str) -> Any:
    """Poll until something is true and return it; fail at the deadline."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        found = happened()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited {DEADLINE_S} s in vain: {what}")


def alive(pid: int) -> bool:
    """True if a process runs; a zombie that its adopter has not collected yet is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def kill_leftovers(pids: list[int]) -> None:
    """End processes that a failed test has left."""
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def report_in(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return made


@functools.cache
def first_run(folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The small case on torch, ort and sim into the session's store; built on the first call."""
    folder.mkdir(parents=True)
    done = cli_from_the_start("run", config(folder), "--report", folder / "report", cwd=folder)
    return done, report_in(folder / "report")


def copied_store(folder: Path) -> Path:
    """A store of a test's own with what `first_run` made, save the QPC, so that a compiler has to be run."""
    shared, own = Path(os.environ["QEFF_VALIDATE_HOME"]), folder / "store"
    for kind in ("inputs", "reference", "floor", "onnx"):
        shutil.copytree(shared / kind, own / kind, copy_function=os.link)  # files of a store are never written again
    return own


def made_for_another_host(folder: Path, extra: str = "") -> Path:
    """Make a bundle, an ONNX file and its recorded reference in a folder, in this process; return the folder."""
    from qeff_validate.cli import main

    cases = config(folder, case(extra=f"exporter: torchscript\nruntimes: [ort, sim]\n{extra}"))
    store = ("--store", str(folder / "store"))
    assert main(["build", str(cases), "--bundle", str(folder / "bundle"), "--runtime", "sim", *store]) == 0
    assert main(["run", str(cases), "--record", str(folder), "--report", str(folder / "r"), *store]) == 0
    (graph,) = folder.glob("store/onnx/*/model.onnx")
    (folder / "model.onnx").write_bytes(graph.read_bytes())
    return folder


def unfinished(store: Path) -> list[str]:
    """What lies half-made in a store."""
    return sorted(path.name for path in (store / "tmp").glob("*"))
