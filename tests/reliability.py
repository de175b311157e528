# SPDX-License-Identifier: Apache-2.0
"""Write docs/reliability.md: what comes of hostile inputs, injected faults and kills (``make reliability``, minutes).

Every input is run by the command line in a process of its own. What is drawn is drawn with a seed, so each run of this
command tries the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import hostile_inputs
import random_faults
from hostile_inputs import KINDS, GoodFiles, Input
from random_faults import SIGNALS, STORED, Setting
from warm_cli import Run, WarmCli

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
LIMIT_S = 60
"""After which a run counts as a hang; those with a time limit of their own have 10 s for each answer."""

BUG = re.compile(r"Traceback \(most recent|this is a bug|unexpected [A-Z]\w+:")
BAD = ("traceback", "hang", "wrong verdict")
COLUMNS = ("clear error", "right verdict", *BAD)

TEMPLATE = """\
# What comes of broken input, faults and kills

Written by `make reliability`; nothing here is edited by hand.

**{tried:,} hostile inputs, {faults} faults, {kills} kills: \
{bad} tracebacks, hangs or wrong verdicts.** ({versions})

## Hostile inputs

Each is run by the command line in a process of its own (a fork of one that has imported the frameworks), with {limit} s
and 4 GiB at most. They are listed ones (bombs, loops, pipes, devices, links, lies in headers, ten million layers) and
random ones (bits, stretches of bytes and values of good files, with a seed). A *clear error* is exit code 2 or 3 with a
message and neither a traceback nor "unexpected". A verdict is *right* if a healthy model does not fail, and if what was
damaged does not pass: whether it is damaged, ONNX Runtime, transformers or a comparison of the contents decides. Of
adapters only false alarms are counted. Where digests or checksums were computed anew, as whoever forges a file would
do, any verdict is taken, and tracebacks and hangs alone are counted. Most memory of a run: {megabytes:,.0f} MB.

| input | tried | {columns} |
|---|---|---|---|---|---|---|
{inputs}

## Faults and kills

After each the case is run once more: its verdict must be that of a fresh store, every entry of the store must be as it
was made, and no process, lock, lease or temporary file may be left.

| fault | times | something was wrong |
|---|---|---|
{table}
"""


def outcome(run: Run, item: Input, folder: Path) -> tuple[str, str]:
    """Return the column of a run, and what is wrong with it."""
    if run.code is None:
        return "hang", ""
    if run.code < 0 or BUG.search(run.text):
        return "traceback", f"exit code {run.code}: {run.text[-1500:]}"
    if run.code in (2, 3):
        said = re.search(r"qeff-validate: .|: error at |: not_run: |Error|Usage", run.text)
        return ("clear error", "") if said else ("traceback", f"no message: {run.text[-1500:]}")
    wrong = item.judge(statuses_in(folder / "report"), folder) if run.code in (0, 1) else f"exit code {run.code}"
    return ("wrong verdict", f"{wrong}: {run.text[-1500:]}") if wrong else ("right verdict", "")


def statuses_in(report: Path) -> list[str]:
    """Return the statuses of a report; none if the command writes no report."""
    path = report / "report.json"
    return [result["status"] for result in json.loads(path.read_bytes())["results"]] if path.is_file() else []


def try_inputs(
    cli: WarmCli, good: GoodFiles, items: Iterator[Input], folder: Path
) -> Iterator[tuple[Input, Run, str, str]]:
    """Run inputs one after the other and yield what came of each."""
    for item in items:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run = cli.run(*item.make(folder), cwd=folder, limit=LIMIT_S)
        yield item, run, *outcome(run, item, folder)


def sample(
    maker: Callable[[GoodFiles, int], Iterator[Input]], good: GoodFiles, count: int, share: int
) -> Iterator[Input]:
    """Return every ``share``-th input of a kind."""
    return islice(maker(good, count), 0, None, share)


def faults(setting: Setting, folder: Path, kills: int) -> Iterator[tuple[str, list[str]]]:
    """Inject every fault and yield its name and what was wrong afterwards."""
    chance = random.Random("kills")
    numbers = list(SIGNALS)
    for number in range(kills):
        name = numbers[number % len(numbers)]
        moment = chance.uniform(0, setting.seconds)
        yield f"killed by {name.name}", random_faults.kill(setting, folder / f"kill-{number}", name, moment)
    for kind in STORED:
        for seed in range(3):
            yield f"bit flipped: {kind}", random_faults.flip(setting, folder / f"flip-{kind}-{seed}", kind, seed)
    for number in range(3):
        yield "pruned under a run", random_faults.prune(setting, folder / f"prune-{number}")
        yield "four processes on one store", random_faults.crowd(setting, folder / f"crowd-{number}")
    for size in random_faults.FILE_SIZES:
        yield "file that may not grow", random_faults.fill(setting, folder / f"file-{size}", size, disk=False)
    if random_faults.may_mount(folder / "probe"):
        for size in random_faults.DISK_SIZES:
            yield "full disk (tmpfs)", random_faults.fill(setting, folder / f"disk-{size}", size, disk=True)
    else:
        print("full disk: not tried, this user may not mount a tmpfs", flush=True)


def rows(counts: dict[str, Counter[str]]) -> str:
    """Return the rows of the table of inputs, with their sum."""
    total = Counter()
    for counter in counts.values():
        total.update(counter)
    lines = []
    for name, counter in (*counts.items(), ("**all**", total)):
        lines.append(f"| {name} | {sum(counter.values())} | {' | '.join(str(counter[key]) for key in COLUMNS)} |")
    return "\n".join(lines)


def versions() -> str:
    """Return the versions that a reader needs to know."""
    from qeff_validate.engine import environment
    from qeff_validate.protocols import Settings

    known = environment(Settings())["versions"]
    return ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "transformers", "onnxruntime", "peft"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything and write the page; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="KIND", action="append", help="inputs of this kind alone; no page is written")
    parser.add_argument("--share", type=int, default=1, help="only every so many-th input of a kind")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="reliability-") as place, WarmCli(Path(place)) as cli:
        return measure(cli, Path(place), options)


def measure(cli: WarmCli, folder: Path, options: argparse.Namespace) -> int:
    """Run inputs and faults, print what is wrong, and write the page."""
    unknown = {*(options.only or ())} - {*KINDS}
    if unknown:
        raise SystemExit(f"--only: no kind is called {sorted(unknown)[0]!r}; known: {', '.join(KINDS)}")
    good = hostile_inputs.prepare(cli, folder / "good")
    counts: dict[str, Counter[str]] = {}
    megabytes, bad = 0.0, 0
    for kind, (maker, count) in KINDS.items():
        if options.only and kind not in options.only:
            continue
        counts[kind], start = Counter(), time.monotonic()
        for item, run, column, problem in try_inputs(
            cli, good, sample(maker, good, count, options.share), folder / "x"
        ):
            counts[kind][column] += 1
            megabytes = max(megabytes, run.megabytes)
            if column in BAD:
                bad += 1
                print(f"{column}: {kind}: {item.name}: {problem}", flush=True)
        seconds = time.monotonic() - start
        print(f"{kind}: {dict(counts[kind])} in {seconds:.0f} s, {megabytes:,.0f} MB", flush=True)
    if options.only:
        return int(bad > 0)
    injected: dict[str, list[list[str]]] = {}
    (folder / "faults").mkdir()
    for name, problems in faults(random_faults.prepare(cli, folder / "setting"), folder / "faults", options.kills):
        injected.setdefault(name, []).append(problems)
        for problem in problems:
            bad += 1
            print(f"{name}: {problem}", flush=True)
    print({name: len(found) for name, found in injected.items()}, flush=True)
    killed = sum(len(found) for name, found in injected.items() if name.startswith("killed"))
    lines = [f"| {name} | {len(found)} | {sum(map(bool, found))} |" for name, found in injected.items()]
    page = TEMPLATE.format(
        tried=sum(sum(counter.values()) for counter in counts.values()),
        faults=sum(map(len, injected.values())) - killed,
        kills=killed,
        bad=bad,
        versions=versions(),
        limit=LIMIT_S,
        megabytes=megabytes,
        columns=" | ".join(COLUMNS),
        inputs=rows(counts),
        table="\n".join(lines),
    )
    if options.share == 1:
        options.output.write_text(page, encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
