# SPDX-License-Identifier: Apache-2.0
"""Faults at random moments and places: kills, full disks, flipped bits, prunes and other processes, each with a seed.

Each function does one thing to a run or to its store, runs the case once more, and returns what was wrong afterwards:
an empty list if nothing broken was served, nothing was left, and the verdict is that of a fresh store.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked_children import SOCKET
from processes import DEADLINE_S, SMALL_BERT, until
from warm_cli import Run, WarmCli

from qeff_validate.artifact import digest_files
from qeff_validate.builders.store import PROVENANCE, Store

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
"""What a run can be killed with, and the exit code that it then has."""

STORED = ("inputs", "reference", "states", "onnx", "qpc", "floor", "ceiling", PROVENANCE)
"""Kinds of stored files; a provenance is that of any of the others."""

ALWAYS_READ = ("inputs", "onnx", "qpc", "floor", "ceiling")
"""Kinds of which a repeated run reads every entry."""

READ_FOR = {"reference": ("floor",), "states": ("reference", "floor", "ceiling")}
"""What a kind is read for: with that in the store, it would stay unread."""

FILE_SIZES = (1_500, 20_000, 131_072)
DISK_SIZES = (16_384, 60_000, 150_000)
"""Bytes of which the small case needs more: for its reference, its export, its compiled program."""

LIMIT_S = 4 * DEADLINE_S
BUGS = ("Traceback", "this is a bug", "unexpected ")


@dataclass(frozen=True, slots=True)
class Setting:
    """A case whose verdict on a fresh store is known.

    Attributes:
        cli: runs it.
        folder: place of this setting; each fault gets a folder of its own below.
        store: with everything of the case.
        verdicts: by tolerance: ``auto``, which measures, and ``table``, which is fast.
        seconds: how long the ``table`` run takes on an empty store.
        forks: of the server that makes the processes of an undisturbed run (`forked_children`); None: they are real.
    """

    cli: WarmCli
    folder: Path
    store: Path
    verdicts: dict[str, Any]
    seconds: float
    forks: Path | None = None

    def start(self, folder: Path, tolerance: str = "table", **more: Any) -> int:
        """Start a run on ``folder/store`` and return its process id."""
        folder.mkdir(exist_ok=True)
        places = ("--store", folder / "store", "--report", folder / "report")
        return self.cli.start("run", self.folder / f"{tolerance}.yaml", *places, cwd=folder, **more)

    def copy(self, folder: Path, *left_out: str) -> Path:
        """Copy the store to ``folder/store``, without some kinds."""
        shutil.copytree(self.store, folder / "store", ignore=lambda at, _: left_out if Path(at) == self.store else ())
        return folder / "store"


def prepare(cli: WarmCli, folder: Path, forks: Path | None = None) -> Setting:
    """Write the configs and run both of them, each on an empty store at first."""
    folder.mkdir()
    for tolerance in ("auto", "table"):
        lines = f"    exporter: torchscript\n    tolerance: {tolerance}\n    runtimes: [ort, sim]\n"
        (folder / f"{tolerance}.yaml").write_text(f"cases:\n  - name: tiny\n{SMALL_BERT}{lines}", encoding="utf-8")
    verdicts: dict[str, Any] = {}
    seconds = 0.0
    setting = Setting(cli, folder, folder / "store", verdicts, 0.0)
    for tolerance in ("table", "auto"):
        run = cli.wait(setting.start(folder, tolerance), LIMIT_S)
        assert run.code == 0, run.text
        verdicts[tolerance] = verdicts_in(folder / "report")
        seconds = seconds or run.seconds
    return Setting(cli, folder, folder / "store", verdicts, seconds, forks)


def verdicts_in(report: Path) -> list[dict[str, Any]]:
    """Return the results of a report, without times, and without places and digests, which depend on the store's."""
    results = json.loads((report / "report.json").read_text(encoding="utf-8"))["results"]
    return [{key: value for key, value in result.items() if key not in ("timings_s", "artifact")} for result in results]


# --- faults ----------------------------------------------------------------------------------------------


def kill(setting: Setting, folder: Path, number: signal.Signals, moment: float) -> list[str]:
    """Kill a run on an empty store so many seconds after it has begun; half as many if it is done by then."""
    pid = setting.start(folder)
    while setting.cli.ended(pid, moment):
        setting.cli.wait(pid, DEADLINE_S)
        shutil.rmtree(folder)
        moment /= 2
        pid = setting.start(folder)
    subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)
    run = setting.cli.wait(pid, DEADLINE_S)
    wrong = _unclear(run)
    if run.code not in {SIGNALS[number], 0}:
        wrong.append(f"exit code {run.code} after {number.name}")
    return [*wrong, *_orphans(setting), *_next_run(setting, folder)]


def flip(setting: Setting, folder: Path, kind: str, seed: int) -> list[str]:
    """Flip a bit of a stored file."""
    store, chance = setting.copy(folder, *READ_FOR.get(kind, ())), random.Random(seed)
    kinds = ALWAYS_READ if kind == PROVENANCE else (kind,)
    files = sorted(path for name in kinds for path in (store / name).rglob("*") if path.is_file())
    path = chance.choice([path for path in files if (path.name == PROVENANCE) == (kind == PROVENANCE)])
    flip_bit(path, chance)
    return _next_run(setting, folder, "auto")


def prune(setting: Setting, folder: Path) -> list[str]:
    """Prune everything, again and again, while a run needs it."""
    setting.copy(folder, "qpc")
    pid = setting.start(folder)
    count = 0
    while not setting.cli.ended(pid, 0.05):
        Store(folder / "store").prune(unused_since=float("inf"))
        count += 1
    run = setting.cli.wait(pid, LIMIT_S)
    wrong = [] if count else ["nothing was pruned while it ran"]
    return [*wrong, *_differences(setting, folder, run, "table"), *_next_run(setting, folder)]


def crowd(setting: Setting, folder: Path, count: int = 4) -> list[str]:
    """Start several processes on one empty store."""
    folder.mkdir()
    wrong = []
    places = [folder / f"run-{number}" for number in range(count)]
    (folder / "store").mkdir()
    for place in places:
        place.mkdir()
        (place / "store").symlink_to(folder / "store")
    runs = [(place, setting.start(place)) for place in places]
    for place, pid in runs:
        wrong += _differences(setting, place, setting.cli.wait(pid, LIMIT_S), "table")
    return [*wrong, *_orphans(setting), *_next_run(setting, folder)]


def fill(setting: Setting, folder: Path, size: int, *, disk: bool) -> list[str]:
    """Run where a disk has ``size`` bytes (``disk``) or no file may be larger; then where there is room."""
    folder.mkdir()
    with small_disk(folder, size) if disk else contextlib.nullcontext():
        run = setting.cli.wait(setting.start(folder, largest_file=None if disk else size), LIMIT_S)
        wrong = _unclear(run)
        if run.code != 3:
            wrong.append(f"exit code {run.code} on a full disk")
        if not any(word in run.text for word in ("No space left", "File too large")):
            wrong.append(f"a full disk is not named: {run.text[-300:]}")
        if disk:
            subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True, capture_output=True)
        return [*wrong, *_orphans(setting), *_next_run(setting, folder)]


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of so many bytes on a folder, and take it away.

    Raises:
        PermissionError: this user may not mount.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def may_mount(folder: Path) -> bool:
    """Say whether this user may mount a tmpfs."""
    folder.mkdir()
    try:
        with small_disk(folder, 1 << 16):
            return True
    except (PermissionError, FileNotFoundError):
        return False


def flip_bit(path: Path, chance: random.Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


# --- what may be wrong afterwards ------------------------------------------------------------------------


def _next_run(setting: Setting, folder: Path, tolerance: str = "table") -> list[str]:
    """Run once more and return what differs from a fresh store, and what is left."""
    variables = {SOCKET: str(setting.forks)} if setting.forks else {}
    run = setting.cli.wait(setting.start(folder, tolerance, variables=variables), LIMIT_S)
    return [*_differences(setting, folder, run, tolerance), *leftovers(folder), *broken_entries(folder / "store")]


def _differences(setting: Setting, folder: Path, run: Run, tolerance: str) -> list[str]:
    if run.code != 0:
        return [f"exit code {run.code}: {run.text[-2000:]}"]
    if verdicts_in(folder / "report") != setting.verdicts[tolerance]:
        return ["the verdict is not that of a fresh store"]
    return []


def _unclear(run: Run) -> list[str]:
    if run.code is None:
        return ["it did not end"]
    return [f"{word!r} was said: {run.text[-2000:]}" for word in BUGS if word in run.text]


def _orphans(setting: Setting) -> list[str]:
    """Wait until all children of runs that ended are gone, as long as no child works by itself."""
    try:
        until(lambda: not setting.cli.children(), "children of a run end with it")
    except AssertionError as exc:
        return [f"{exc}: {setting.cli.children()}"]
    return []


def leftovers(folder: Path) -> list[str]:
    """Return temporary files, locks and leases in a store, and temporary names beside the report."""
    store = folder / "store"
    paths: Sequence[Path] = [
        *(path for name in ("tmp", "locks", "leases") for path in (store / name).glob("*")),
        *(path for path in folder.glob(".*")),
        *(path for path in (folder / "report").glob(".*")),
    ]
    return [f"{path.relative_to(folder)} is left" for path in paths]


def broken_entries(store: Path) -> list[str]:
    """Return the entries whose files are not those of their provenance."""
    wrong = []
    for entry in Store(store).entries():
        files = [path for path in entry.path.rglob("*") if path.is_file() and path.name != PROVENANCE]
        try:
            listed = json.loads((entry.path / PROVENANCE).read_bytes())["files"]
        except (ValueError, KeyError):
            listed = None
        if digest_files(files, root=entry.path) != listed:
            wrong.append(f"{entry.kind} entry {entry.path.name} is not as it was made")
    return wrong
