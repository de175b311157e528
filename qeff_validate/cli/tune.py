# SPDX-License-Identifier: Apache-2.0
"""The command ``tune``: which nodes of a graph leave the range of fp16, and which must stay in float32."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.cli.options import SdkPrefix, StoreDir, Verbose, device_ids, select_cases
from qeff_validate.cli.progress import print_text, terminal_progress
from qeff_validate.errors import ConfigError

if TYPE_CHECKING:
    from qeff_validate.explain.range_audit import NodeRange, RangeAudit
    from qeff_validate.pipeline.tuning import Tuning
    from qeff_validate.report.result import Result

SHOWN = 20
"""Nodes of an audit that are printed: the worst."""

EPILOG = (
    "Exit codes: 0 the case passes, with a list of nodes or as it is, or there is an audit · 1 no list was found · "
    "2 wrong usage or config · 3 something could not be built or run."
)


def tune(
    config: Annotated[Path, typer.Argument(help="YAML config file", metavar="CONFIG")],
    case: Annotated[str, typer.Option("--case", help="the case")],
    runtime: Annotated[str, typer.Option("--runtime", help="where it must pass: sim or ai100")] = "sim",
    audit: Annotated[bool, typer.Option("--audit", help="print what fp16 does to each node; compile nothing")] = False,
    out: Annotated[Path, typer.Option("--out", help="file that receives the list of nodes")] = Path(
        "node-precision.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    devices: Annotated[str, typer.Option("--device-ids", help="cards to use, e.g. 0,1")] = "",
    sdk: SdkPrefix = None,
    store: StoreDir = None,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON alone, with all nodes of an audit")] = False,
    verbose: Verbose = False,
) -> None:
    """Find the fewest nodes that must compute in float32 for a case to pass in fp16, and write them to a file.

    It starts with the nodes whose values are beyond 65,504 and those that read them, compiles, and leaves nodes out
    while the case still passes: at most 12 compilations. Example:

    [bold]qeff-validate tune my.yaml --case my-embedder --audit[/]

    [bold]qeff-validate tune my.yaml --case my-embedder --out node-precision.yaml[/]
    """
    from qeff_validate.engine import Runner, load
    from qeff_validate.protocols import Settings

    (selected,) = select_cases(load([config]), [case])
    settings = Settings(sdk=sdk, device_ids=device_ids(devices))
    runner = Runner(store=store, settings=settings, progress=terminal_progress(store, verbose, quiet=json_output))
    if audit:
        _print_audit(runner.audited(selected), json_output=json_output)
        return
    _check_new(out, force=force)
    tuning = runner.tuned(selected, runtime)
    if tuning.after is not None:
        _write(out, tuning.text, force=force)
    if json_output:
        _print_json(tuning)
    else:
        for line in lines(tuning, _from_config(out, config)):
            print_text(line)
    if tuning.search is not None and tuning.after is None:
        raise typer.Exit(1)


def _check_new(out: Path, *, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise ConfigError(f"--out: {out} exists already; choose another name, or replace a file with --force")


def _write(out: Path, text: str, *, force: bool) -> None:
    from qeff_validate.report.writers import write_texts

    _check_new(out, force=force)  # it may have been made meanwhile
    write_texts(out.parent, {out.name: text})


def _print_audit(audited: RangeAudit, *, json_output: bool) -> None:
    from qeff_validate.report.result import finite

    if json_output:
        plain = {"nodes": [finite(node.to_plain()) for node in audited.nodes]}
        print_text(json.dumps(plain, ensure_ascii=False, allow_nan=False))
        return
    for line in audit_lines(audited):
        print_text(line)


def audit_lines(audited: RangeAudit) -> list[str]:
    """Return an audit as text: the worst nodes, and how many overflow."""
    shown = audited.worst(SHOWN)
    width = max((len(_place(node)) for node in shown), default=0)
    text = [f"{'node':<{width}}  {'operator':<20} greatest  to zero  rounding"]
    text += [
        f"{_place(node):<{width}}  {node.operator:<20} {node.greatest:8.3g}  {node.zeroed_share:7.2%}"
        f"  {'overflow' if node.overflows else f'{node.error:8.1e}'}"
        for node in shown
    ]
    overflowing = len(audited.overflowing())
    count = f"{overflowing} of {len(audited.nodes)} nodes have values beyond 65,504"
    return [*text, "", f"{count}{'' if overflowing else ': nothing overflows fp16'}"]


def _place(node: NodeRange) -> str:
    path = node.module.replace(".", "/")
    return f"{node.module}: {node.output}" if path and path not in node.output else node.output


def _verdict(result: Result) -> str:
    return f"{result.status}{f': {result.reason}' if result.reason and result.status != 'pass' else ''}"


def _from_config(out: Path, config: Path) -> str:
    """Return the path of the file as the case has to name it: relative to the config."""
    return Path(os.path.relpath(out.resolve(), config.resolve().parent)).as_posix()


def lines(tuning: Tuning, name: str) -> list[str]:
    """Return what a search came to as text: both verdicts, the nodes, and what to add to the case.

    Args:
        tuning: the search.
        name: of the written file, relative to the config.
    """
    before = f"as it is: {_verdict(tuning.before)}"
    if tuning.search is None:
        return [before, "the case passes without further nodes in float32; nothing is written"]
    if tuning.after is None or tuning.search.names is None:
        tried = [f"  {name}" for name in tuning.search.tried] or ["  none: no value leaves the range or rounds badly"]
        return [before, f"no list of nodes was found in {tuning.search.trials} trials; tried were", *tried]
    found = tuning.search.names
    judged = []
    if tuning.beyond_range:
        judged = ["the original model overflows in fp16: its noise was measured with such values in float32"]
    if tuning.by_table:
        judged = ["judged by the fixed bounds: the original model overflows in fp16, so its noise there is no bound"]
    end = "" if tuning.search.smallest else "; the trials ran out, fewer may do"
    return [
        before,
        f"with {len(found)} nodes in float32: {_verdict(tuning.after)}",
        *(f"  {name}" for name in found),
        *judged,
        f"{tuning.search.trials} lists were tried{end}",
        "the list is written; add to the case (the path is relative to the config):",
        f"    compile: {{flags: {{node-precision-info: {name}}}}}",
        *(["    precision: {beyond_range: float32}  # beside what it says already"] if tuning.beyond_range else []),
        *(["    tolerance: table"] if tuning.by_table else []),
    ]


def _print_json(tuning: Tuning) -> None:
    plain = {
        "before": tuning.before.plain(),
        "after": None if tuning.after is None else tuning.after.plain(),
        "nodes": None if tuning.search is None or tuning.search.names is None else list(tuning.search.names),
        "tried": [] if tuning.search is None else list(tuning.search.tried),
        "trials": 0 if tuning.search is None else tuning.search.trials,
        "beyond_range": tuning.beyond_range,
        "by_table": tuning.by_table,
        "smallest": tuning.search is not None and tuning.search.smallest,
    }
    print_text(json.dumps(plain, ensure_ascii=False, allow_nan=False))
