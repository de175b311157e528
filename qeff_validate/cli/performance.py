# SPDX-License-Identifier: Apache-2.0
"""The commands ``perf`` and ``baseline {save,list,show,trend}``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.cli.options import CaseNames, Configs, SdkPrefix, StoreDir, Verbose, runtime_names, select_cases
from qeff_validate.cli.options import device_ids as parse_ids
from qeff_validate.cli.progress import console, print_text, print_wrapped, terminal_progress
from qeff_validate.errors import ConfigError
from qeff_validate.report.report import DEFAULT_DIR
from qeff_validate.report.timings import HEAD, TimedEntry, timing_closing, timing_lines, timing_rows

if TYPE_CHECKING:
    from rich.table import Table

    from qeff_validate.report.report import Report

EPILOG = (
    "Exit codes: 0 every budget and limit holds, or nothing was to be judged · 1 one does not, or noise hides it · "
    "2 wrong usage or config · 3 an error, or nothing was timed · 130 interrupted."
)

TREND_HEAD = ("case", "runtime", "quantity", "first", "last", "growth", "runs")

app = typer.Typer(help="Save, list, show or follow baselines: what a run gave, under a name.", no_args_is_help=True)

Directory = Annotated[
    Path | None, typer.Option("--directory", help="of baselines; default: baselines/ beside --config, else here")
]
BesideConfig = Annotated[Path | None, typer.Option("--config", help="baselines/ beside this config")]
Name = Annotated[str, typer.Argument(help="name of the baseline")]


def perf(
    configs: Configs,
    case: CaseNames = None,
    runtimes: Annotated[str | None, typer.Option(help="instead of the cases' own, e.g. ort,ai100")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="a config or bundle, which is run beside; or a report or baseline with timings"),
    ] = None,
    report: Annotated[Path, typer.Option(help="directory for report.html, .json and .md")] = Path(DEFAULT_DIR),
    device_ids: Annotated[str, typer.Option("--device-ids", help="cards to use, e.g. 0,1")] = "",
    run_timeout: Annotated[float, typer.Option(min=0.001, help="seconds that a launch may take beyond 600")] = 600,
    sdk: SdkPrefix = None,
    store: StoreDir = None,
    allow_inconclusive: Annotated[bool, typer.Option("--allow-inconclusive", help="do not fail on these")] = False,
    verbose: Verbose = False,
) -> None:
    """Time cases on runtimes, and judge them against their budgets and against a baseline.

    Examples: [bold]qeff-validate perf configs/performance.yaml[/]
    and, against another version, [bold]qeff-validate perf new.yaml --against old.yaml[/]
    """
    from qeff_validate.engine import load
    from qeff_validate.engine import perf as measure
    from qeff_validate.folders import check_writable
    from qeff_validate.protocols import Settings
    from qeff_validate.report.writers import remove_reports

    check_writable(report, "--report")
    cases = select_cases(load(configs), case or [])
    names = runtime_names(runtimes)
    settings = Settings(sdk=sdk, device_ids=parse_ids(device_ids), run_timeout_s=run_timeout)
    progress = terminal_progress(store, verbose)
    made = measure(cases, names, against=against, store=store, settings=settings, progress=progress)
    remove_reports(report)  # only now: it may be what this run was compared with
    made.write(report)
    console().print(timings_table(made.results))
    for text in (*timing_lines(made.results), *made.problems(), *timing_closing(made.results)):
        print_wrapped(text)
    print_wrapped(f"report: {report / 'report.html'}, {report / 'report.json'}, {report / 'report.md'}")
    raise typer.Exit(exit_code(made, allow_inconclusive=allow_inconclusive))


def exit_code(report: Report, *, allow_inconclusive: bool = False) -> int:
    """Return the exit code of a report of timings; what was measured and had no budget is no failure."""
    states = [result.status for result in report.results]
    if any(result.status == "error" and result.stage == "config" for result in report.results):
        return 2
    if "fail" in states or ("inconclusive" in states and not allow_inconclusive):
        return 1
    return 3 if "error" in states or not any(result.performance for result in report.results) else 0


def timings_table(results: Sequence[TimedEntry]) -> Table:
    """Return a rich table with a row for each workload."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*HEAD, box=None, header_style="bold", pad_edge=False)
    for cells in timing_rows(results):
        table.add_row(*map(escape, cells))
    return table


@app.command()
def save(
    name: Name,
    report: Annotated[
        list[Path] | None, typer.Option(help=f"report.json or its directory; repeatable; default: {DEFAULT_DIR}")
    ] = None,
    config: BesideConfig = None,
    directory: Directory = None,
) -> None:
    """Save metrics and timings of reports under a name, in one file that can be committed.

    Example: [bold]qeff-validate baseline save v1 --report qv-report --config configs/quickstart.yaml[/]
    """
    from qeff_validate.report.baseline import save_baseline
    from qeff_validate.report.report import read_report

    reports = [read_report(path) for path in report or [Path(DEFAULT_DIR)]]
    print_text(f"baseline {name}: {save_baseline(folder(config, directory), name, reports)}")


@app.command("list")
def list_baselines(config: BesideConfig = None, directory: Directory = None) -> None:
    """List the baselines of a directory."""
    from qeff_validate.report.baseline import baseline_files, parse_baseline

    for path in baseline_files(folder(config, directory)):
        results = parse_baseline(path).results
        timed = sum(entry.performance is not None for entry in results)
        print_text(f"{path.stem:20} {len(results)} results, {timed} with timings  {path}")


@app.command()
def show(name: Name, config: BesideConfig = None, directory: Directory = None) -> None:
    """Show the values of a baseline."""
    from qeff_validate.report.baseline import read_baseline

    baseline = read_baseline(folder(config, directory), name)
    for entry in baseline.results:
        simulated = " (simulated)" if entry.simulated else ""
        print_text(f"{entry.case}-{entry.runtime}{simulated}: {entry.status}, {entry.precision or 'timings'}")
        for metric, value in entry.metrics.items():
            print_text(f"  {metric:30} {value if isinstance(value, str) else format(value, '.4g')}")
    if any(entry.performance for entry in baseline.results):
        console().print(timings_table(baseline.results))


@app.command()
def trend(
    runs: Annotated[
        list[str], typer.Argument(help="names of baselines and directories of reports, the earliest first")
    ],
    keyword: Annotated[
        str | None, typer.Option("-k", help="only cases whose name contains this, or matches * and ?")
    ] = None,
    config: BesideConfig = None,
    directory: Directory = None,
) -> None:
    """Show how each value went over several runs, with bars from its least to its greatest on a log scale.

    Example: [bold]qeff-validate baseline trend v1 v2 v3 qv-report[/]
    """
    from fnmatch import fnmatchcase

    from rich.markup import escape
    from rich.table import Table

    from qeff_validate.report.baseline import read_baseline, read_entries
    from qeff_validate.report.trend import trends

    base = folder(config, directory)
    read = [read_entries(Path(run)) if Path(run).exists() else read_baseline(base, run).results for run in runs]
    glob = "*" if keyword is None else keyword if set(keyword) & set("*?") else f"*{keyword}*"
    table = Table(*TREND_HEAD, box=None, header_style="bold", pad_edge=False)
    for item in trends([[entry for entry in run if fnmatchcase(entry.case, glob)] for run in read]):
        known = [value for value in item.values if value is not None]
        numbers = f"{known[0]:.3g}", f"{known[-1]:.3g}", "" if item.growth is None else f"× {item.growth:.3g}"
        table.add_row(*map(escape, (item.case, item.runtime, item.quantity, *numbers)), item.bars())
    if not table.row_count:
        raise ConfigError(f"-k {keyword!r} fits no case of these runs" if keyword else "these runs have no values")
    console().print(table)


def folder(config: Path | None, directory: Path | None) -> Path:
    """Return the directory of baselines."""
    from qeff_validate.report.baseline import FOLDER

    return directory or (config.parent if config is not None else Path()) / FOLDER
