# SPDX-License-Identifier: Apache-2.0
"""The command ``run``: validate cases and write the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.cli import performance
from qeff_validate.cli.made_results import MadeResults, write_report
from qeff_validate.cli.options import (
    SdkPrefix,
    StoreDir,
    Verbose,
    device_ids,
    matching_cases,
    required_runtimes,
    runtime_names,
    select_cases,
    shard,
)
from qeff_validate.cli.progress import console, print_text, print_wrapped, terminal_progress
from qeff_validate.errors import ConfigError
from qeff_validate.pipeline.explanation import ExplainMode
from qeff_validate.report.report import DEFAULT_DIR
from qeff_validate.report.text import NARROW_BELOW, table

if TYPE_CHECKING:
    from qeff_validate.report.report import Report

TABLE_ROWS = 200
"""Results of a table on a terminal; of more, each table has its own head."""


def run(
    configs: Annotated[list[Path] | None, typer.Argument(help="YAML config files", metavar="[CONFIG…]")] = None,
    model: Annotated[
        str | None, typer.Option(help="a source instead of a config: path:DIR, random:bert, a hub id")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="a bundle written by 'build', instead of a config")] = None,
    bundle_digest: Annotated[
        str | None,
        typer.Option("--bundle-digest", help="the digest that 'build' printed; a bundle with another one is refused"),
    ] = None,
    kind: Annotated[str, typer.Option(help="model kind of --model")] = "embedding",
    option: Annotated[list[str] | None, typer.Option(help="option of --model, KEY=VALUE; repeatable")] = None,
    case: Annotated[list[str] | None, typer.Option("--case", help="run only this case; repeatable")] = None,
    keyword: Annotated[
        str | None, typer.Option("-k", help="run only cases whose name contains this, or fits it with * and ?")
    ] = None,
    runtimes: Annotated[
        str | None, typer.Option(help="replaces the runtimes of the cases, e.g. torch,ort,sim,ai100")
    ] = None,
    require: Annotated[str, typer.Option(help="runtimes that must run; 'not run' is then an error")] = "",
    devices: Annotated[str, typer.Option("--device-ids", help="cards to use, e.g. 0,1")] = "",
    run_timeout: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="time limit of one run in seconds, for runtimes in a process of their own (ai100, sim, a user's ONNX"
            " file)",
        ),
    ] = 600,
    sdk: SdkPrefix = None,
    report: Annotated[Path, typer.Option(help="directory for report.html, .json and .md")] = Path(DEFAULT_DIR),
    reporter: Annotated[
        list[str] | None,
        typer.Option("--reporter", help="also hand the report to this system, e.g. mlflow; repeatable"),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="also write inputs and reference outputs to this directory, CASE.safetensors")
    ] = None,
    store: StoreDir = None,
    baseline: Annotated[
        str | None, typer.Option(help="tell what drifted since this baseline, of baselines/ beside the config")
    ] = None,
    directory: Annotated[Path | None, typer.Option("--directory", help="of baselines, instead")] = None,
    part: Annotated[
        str | None, typer.Option("--shard", metavar="K/N", help="run only every N-th case, from the K-th on")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="directory of the report of a run that was cut off: make only the results that it lacks"),
    ] = None,
    allow_inconclusive: Annotated[
        bool, typer.Option("--allow-inconclusive", help="inconclusive results do not fail the run")
    ] = False,
    jobs: Annotated[
        str,
        typer.Option(
            "--jobs", "-j", help="processes that run stages of cases side by side; auto: one for each processor"
        ),
    ] = "1",
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="do the stages of cases on this host's Ray cluster, e.g. auto or head:6379; local: a new one",
        ),
    ] = None,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", "-x", help="stop after the first result that does not pass")
    ] = False,
    explain: Annotated[
        ExplainMode,
        typer.Option(
            help="say where failing results come from: off; auto, within a minute each; full, within an hour each"
        ),
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print problems and what was proved alone")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="print each result as a line of JSON alone")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="all columns, also on a narrow terminal")] = False,
    verbose: Verbose = False,
) -> None:
    """Run cases on runtimes, compare every output with Hugging Face, print and write the verdicts.

    Examples: [bold]qeff-validate run configs/quickstart.yaml --runtimes ort,sim[/]
    and, without a file, [bold]qeff-validate run --model random:bert --option pooling=max[/]
    """
    from qeff_validate.builders.bundle import read_bundle
    from qeff_validate.engine import case_for, load, validate
    from qeff_validate.folders import check_writable
    from qeff_validate.pipeline.executors.job_count import job_count
    from qeff_validate.protocols import Settings
    from qeff_validate.report.baseline import read_baseline, with_drift
    from qeff_validate.report.reporters import load_reporters, send_report
    from qeff_validate.report.writers import remove_reports

    if sum((bool(configs), model is not None, bundle is not None)) != 1:
        raise typer.BadParameter("give config files, --model SOURCE or --bundle DIR, one of the three")
    if bundle_digest is not None and bundle is None:
        raise typer.BadParameter("--bundle-digest needs --bundle DIR")
    check_writable(report, "--report")
    reporters = load_reporters(reporter or [])
    beside = performance.folder(configs[0] if configs else None, directory)
    before = read_baseline(beside, baseline) if baseline is not None else None
    if model is not None:
        cases = [case_for(model, kind=kind, options=option or [])]
    else:
        cases = load(configs or []) if bundle is None else read_bundle(bundle, digest=bundle_digest)
    cases = shard(matching_cases(select_cases(cases, case or []), keyword), part)
    names = runtime_names(runtimes)
    if bundle is not None and names not in (None, cases[0].runtimes):
        raise ConfigError(f"--runtimes: the bundle was built for {cases[0].runtimes[0]}, and runs there alone")
    settings = Settings(sdk=sdk, device_ids=device_ids(devices), run_timeout_s=run_timeout)
    required = required_runtimes(require)
    made = MadeResults(report, [(one, name) for one in cases for name in names or one.runtimes], settings, resume)
    count = job_count(jobs)
    remove_reports(report)
    with made.reported_if_interrupted():
        results = validate(
            cases,
            names,
            store=store,
            settings=settings,
            progress=terminal_progress(store, verbose, quiet=quiet),
            record=record,
            fail_fast=fail_fast,
            explain=explain,
            jobs=count,
            cluster=cluster,
            results=made,
        )
    results = results if before is None else with_drift(results, before)
    write_error = write_report(results, report)
    if json_lines:
        for result in results.results:
            print_text(json.dumps(result.plain(), ensure_ascii=False, allow_nan=False))
    else:
        print_results(results, wide=wide, quiet=quiet)
    _annotate(results, configs or [], required, allow_inconclusive)
    if write_error is not None:
        raise write_error
    send_report(results, reporters)
    if not json_lines:
        print_closing(results, report)
    raise typer.Exit(results.exit_code(require=required, allow_inconclusive=allow_inconclusive))


def print_results(results: Report, *, wide: bool = False, quiet: bool = False) -> None:
    """Print the table of the results, unless quiet, and below it what is to be told of them.

    Args:
        results: of a run.
        wide: all columns, whatever the width of the terminal.
        quiet: no table.
    """
    if not quiet:
        terminal = console(least=NARROW_BELOW if wide else 0)
        for start in range(0, max(1, len(results.results)), TABLE_ROWS):
            terminal.print(table(results.results[start : start + TABLE_ROWS], width=terminal.width))
    for text in results.problems():
        print_wrapped(f"\n{text}" if "\n" in text else text)


def print_closing(results: Report, folder: Path) -> None:
    """Print the last lines of a run: where the report is, and what was proved."""
    print_wrapped(f"report: {folder / 'report.html'}, {folder / 'report.json'}, {folder / 'report.md'}")
    for text in results.closing():
        print_wrapped(text)


def _annotate(results: Report, configs: Sequence[Path], required: Sequence[str], allow_inconclusive: bool) -> None:
    """Print annotations of the results that fail, in a job of GitHub Actions."""
    from qeff_validate.config.loader import case_places
    from qeff_validate.report.annotations import github_annotations, on_github

    if not on_github():
        return
    places = case_places(configs)
    for line in github_annotations(results.results, places, require=required, allow_inconclusive=allow_inconclusive):
        print_text(line, stderr=True)  # GitHub reads both streams, and standard output may be JSON
