# SPDX-License-Identifier: Apache-2.0
"""The commands: a thin layer over the engine. Exit codes are those of `Report.exit_code`."""

from __future__ import annotations

import math
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qeff_validate.cli import performance, signals
from qeff_validate.cli.output import safe_streams
from qeff_validate.errors import ConfigError, ValidateError, suggest
from qeff_validate.report.result import DEFAULT_DIR
from qeff_validate.sdk.commands import app as sdk_app

if TYPE_CHECKING:
    from rich.console import Console

    from qeff_validate.builders.store import Kept
    from qeff_validate.config.case import Case
    from qeff_validate.report.result import Report
    from qeff_validate.selftest.score import Score

EPILOG = (
    "Exit codes: 0 everything asked for agrees · 1 a mismatch or an inconclusive result · 2 wrong usage or config · "
    "3 an error, a required runtime that did not run, or nothing compared · 130 interrupted."
)

app = typer.Typer(
    name="qeff-validate",
    help="Prove that a Hugging Face model says the same on PyTorch, ONNX Runtime and Qualcomm Cloud AI 100.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Configs = Annotated[list[Path], typer.Argument(help="YAML config files", metavar="CONFIG…")]
Sdk = Annotated[
    str | None, typer.Option("--sdk", help="prefix of the AI 100 SDK (default: QEFF_VALIDATE_SDK, /opt/qti-aic)")
]
StoreDir = Annotated[
    Path | None, typer.Option("--store", help="artifact store (default: QEFF_VALIDATE_HOME, user cache)")
]


@app.command(epilog=EPILOG)
def run(
    configs: Annotated[list[Path] | None, typer.Argument(help="YAML config files", metavar="[CONFIG…]")] = None,
    model: Annotated[
        str | None, typer.Option(help="a source instead of a config: path:DIR, random:bert, a hub id")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="a bundle that 'build' made, instead of a config")] = None,
    bundle_digest: Annotated[
        str | None,
        typer.Option("--bundle-digest", help="the digest that 'build' printed; another bundle is refused"),
    ] = None,
    kind: Annotated[str, typer.Option(help="model kind of --model")] = "embedding",
    option: Annotated[list[str] | None, typer.Option(help="option of --model, KEY=VALUE; repeatable")] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="only this case; may be given more than once")
    ] = None,
    runtimes: Annotated[str | None, typer.Option(help="instead of the cases' own, e.g. torch,ort,sim,ai100")] = None,
    require: Annotated[str, typer.Option(help="runtimes that must run; 'not run' is then an error")] = "",
    device_ids: Annotated[str, typer.Option("--device-ids", help="cards to use, e.g. 0,1")] = "",
    run_timeout: Annotated[
        float,
        typer.Option(
            min=0.001, help="seconds after which a run is ended that gives no answer (ai100, sim, a user's ONNX file)"
        ),
    ] = 600,
    sdk: Sdk = None,
    report: Annotated[Path, typer.Option(help="directory for report.json and report.md")] = Path(DEFAULT_DIR),
    record: Annotated[
        Path | None, typer.Option(help="also write inputs and reference outputs there, CASE.safetensors")
    ] = None,
    store: StoreDir = None,
    baseline: Annotated[
        str | None, typer.Option(help="tell what drifted since this baseline, of baselines/ beside the config")
    ] = None,
    directory: Annotated[Path | None, typer.Option("--directory", help="of baselines, instead")] = None,
    allow_inconclusive: Annotated[bool, typer.Option("--allow-inconclusive", help="do not fail on these")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show the compiler's output as it comes")] = False,
) -> None:
    """Run cases on runtimes, compare every output with Hugging Face, print and write the verdicts.

    Examples: [bold]qeff-validate run configs/quickstart.yaml --runtimes ort,sim[/]
    and, without a file, [bold]qeff-validate run --model random:bert --option pooling=max[/]
    """
    from qeff_validate.builders.bundle import read_bundle
    from qeff_validate.engine import case_for, load, validate
    from qeff_validate.folders import check_writable
    from qeff_validate.protocols import Settings
    from qeff_validate.report.baseline import read_baseline, with_drift
    from qeff_validate.report.text import problems
    from qeff_validate.report.writers import remove_reports

    if sum((bool(configs), model is not None, bundle is not None)) != 1:
        raise typer.BadParameter("give config files, --model SOURCE or --bundle DIR, one of the three")
    if bundle_digest is not None and bundle is None:
        raise typer.BadParameter("--bundle-digest says what to expect of --bundle DIR, which is missing")
    check_writable(report, "--report")
    beside = performance.folder(configs[0] if configs else None, directory)
    before = read_baseline(beside, baseline) if baseline is not None else None
    remove_reports(report)
    if model is not None:
        cases = [case_for(model, kind=kind, options=option or [])]
    else:
        cases = load(configs or []) if bundle is None else read_bundle(bundle, digest=bundle_digest)
    cases = _chosen(cases, case or [])
    names = _split(runtimes) if runtimes is not None else None
    if names is not None and not names:
        raise ConfigError("--runtimes names no runtime")
    if bundle is not None and names not in (None, cases[0].runtimes):
        raise ConfigError(f"--runtimes: the bundle was built for {cases[0].runtimes[0]}, and is judged there alone")
    ids = tuple(_number(text) for text in _split(device_ids))
    settings = Settings(sdk=sdk, device_ids=ids, run_timeout_s=run_timeout)
    required = _known_runtimes(_split(require))
    made = validate(cases, names, store=store, settings=settings, progress=Terminal(verbose), record=record)
    made = made if before is None else with_drift(made, before)
    unwritten = _write(made, report)
    plain = made.plain()
    out = _console()
    out.print(made.table())
    for text in problems(plain):
        out.print(f"\n{text}" if "\n" in text else text, markup=False, highlight=False, soft_wrap=True)
    if unwritten:
        raise unwritten
    out.print(f"report: {report / 'report.json'}, {report / 'report.md'}", markup=False, soft_wrap=True)
    for text in made.closing():
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(made.exit_code(require=required, allow_inconclusive=allow_inconclusive))


@app.command(epilog="Exit codes: 0 every goal was reached · 1 one was not · 2 wrong usage or config · 3 an error.")
def selftest(
    configs: Configs,
    case: Annotated[list[str] | None, typer.Option("--case", help="only this case; repeatable")] = None,
    cases: Annotated[int, typer.Option(min=1, help="how many cases of the configs, evenly spread")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="seeds of each legitimate variant")] = 20,
    stage: Annotated[str, typer.Option(help="fp32, device (on the simulated card), or both")] = "fp32,device",
    report: Annotated[Path, typer.Option(help="directory for selftest.json and selftest.md")] = Path(DEFAULT_DIR),
) -> None:
    """Measure the verdicts: which of some 80 deliberate faults they find, and whether they ever cry wolf.

    Every mutant goes through the whole pipeline, in float32 and as a compiled program on the simulated card; other
    checks judge the same outputs. Goals: 98 % caught in float32, 90 % on the device, no false alarm. Takes minutes.

    Example: [bold]qeff-validate selftest configs/embedding.yaml --case bert-mean --seeds 3[/]
    """
    import json

    from qeff_validate.engine import load, selftest
    from qeff_validate.folders import check_writable
    from qeff_validate.report.result import finite
    from qeff_validate.report.writers import write_texts
    from qeff_validate.selftest.score import markdown

    stages = _split(stage)
    for name in stages:
        if name not in ("fp32", "device"):
            raise ConfigError(f"--stage: no stage is called {name!r}.{suggest(name, ('fp32', 'device'))}")
    known = load(configs)
    chosen = _chosen(known, case or []) if case else _spread([one for one in known if "slow" not in one.marks], cases)
    check_writable(report, "--report")
    title = ", ".join(path.name for path in configs)
    out = _console()
    with _console(stderr=True).status("starting") as status:
        score = selftest(chosen, title=title, seeds=seeds, stages=stages, progress=status.update)  # type: ignore[arg-type]
    _show(out, score)
    text = json.dumps(finite(score.plain()), indent=1) + "\n"
    write_texts(report, {"selftest.json": text, "selftest.md": markdown(score)})
    out.print(f"report: {report / 'selftest.json'}, {report / 'selftest.md'}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if score.shortfalls() else 0)


def _spread(cases: list[Case], count: int) -> list[Case]:
    """Return so many of the cases, evenly spread."""
    return [cases[at * len(cases) // min(count, len(cases))] for at in range(min(count, len(cases)))]


def _show(out: Console, score: Score) -> None:
    from rich.table import Table

    for title, head, rows in score.tables():
        if rows:
            table = Table(*head, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
            for row in rows:
                table.add_row(*row)
            out.print(table, "")
    for title, texts in (("survived", score.survivors()), ("not passed", score.false_alarms())):
        for text in texts:
            out.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)
    for text in score.shortfalls() or ["every goal was reached"]:
        out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Exit codes: 0 the bundle is there · 2 wrong usage or config · 3 something could not be built.")
def build(
    configs: Configs,
    bundle: Annotated[Path, typer.Option(help="the directory to make; must not exist yet")],
    runtime: Annotated[str, typer.Option(help="ai100 or sim: whose compiler, and where it will be judged")],
    case: Annotated[list[str] | None, typer.Option("--case", help="only this case; repeatable")] = None,
    sdk: Sdk = None,
    store: StoreDir = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show the compiler's output as it comes")] = False,
) -> None:
    """Build QPCs with recorded inputs and references, to be judged on a host without torch and compiler.

    There: [bold]qeff-validate run --bundle DIR[/]
    """
    from qeff_validate.engine import bundle as make
    from qeff_validate.engine import load
    from qeff_validate.protocols import Settings

    cases = _chosen(load(configs), case or [])
    digest = make(cases, bundle, runtime, store=store, settings=Settings(sdk=sdk), progress=Terminal(verbose))
    out = _console()
    out.print(f"bundle of {len(cases)} cases for {runtime}: {bundle}", markup=False, soft_wrap=True)
    out.print(f"digest: {digest}", markup=False, highlight=False, soft_wrap=True)


@app.command("list", epilog="Exit codes: 0 the configs are sound · 2 one of them is not.")
def list_cases(configs: Configs) -> None:
    """List the cases of configs with their runtimes; a config with an error says where it is."""
    from rich.markup import escape
    from rich.table import Table

    from qeff_validate.engine import load

    table = Table("case", "model", "source", "runtimes", "options", box=None, pad_edge=False)
    for case in load(configs):
        options = ", ".join(f"{key}={value}" for key, value in case.options.items())
        table.add_row(*(escape(t) for t in (case.name, case.model, case.source, ",".join(case.runtimes), options)))
    _console().print(table)


@app.command()
def doctor(sdk: Sdk = None, store: StoreDir = None) -> None:
    """Say what is installed, which runtimes can be used here, and why not."""
    from qeff_validate.builders.store import Store
    from qeff_validate.engine import environment
    from qeff_validate.protocols import Settings, registered, runtime
    from qeff_validate.sdk.locate import installed

    settings = Settings(sdk=sdk)
    known = environment(settings)
    lines = ["versions"]
    lines += [f"  {name:15} {version or 'not installed'}" for name, version in known["versions"].items()]
    lines.append("runtimes")
    for name in sorted(registered("runtimes")):
        lines.append(f"  {name:15} {runtime(name, settings).probe() or 'usable'}")
    found = installed(sdk)
    lines += ["AI 100 SDK", f"  {'prefix':15} {found.prefix}{'' if found.prefix.is_dir() else ' (not there)'}"]
    try:
        lines.append(f"  {'compiler':15} {' '.join(found.compiler()[0])}")
    except ValidateError as exc:
        lines.append(f"  {'compiler':15} {exc}")
    lines += [f"  {name:15} {version or 'not installed'}" for name, version in found.versions().items()]
    lines += [f"  {'QID ' + str(c.qid):15} {c.values.get('Status')}, free NSPs {c.free_cores}" for c in found.cards()]
    lines += ["store", f"  {'directory':15} {Store(store).root}"]
    _console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


store_app = typer.Typer(help="List or prune the artifact store.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.add_typer(sdk_app, name="sdk")
app.command(epilog=performance.EPILOG)(performance.perf)
app.add_typer(performance.app, name="baseline")


@store_app.command("list")
def store_list(store: StoreDir = None) -> None:
    """List what the store keeps: kind, size, days since it was last used, directory."""
    from qeff_validate.builders.store import Store

    found = Store(store).entries()
    for kept in found:
        _console().print(_kept(kept), markup=False, highlight=False, soft_wrap=True)
    total = sum(kept.size for kept in found) / 1e6
    _console().print(f"{len(found)} entries, {total:.1f} MB in {Store(store).root}", markup=False, soft_wrap=True)


@store_app.command("prune")
def store_prune(
    days: Annotated[float, typer.Option(min=0, help="delete what was not used for so many days; 0: everything")],
    store: StoreDir = None,
) -> None:
    """Delete entries that were not used for some days; what is needed again is built again."""
    from qeff_validate.builders.store import Store

    if not math.isfinite(days):
        raise ConfigError(f"--days: {days} is no number of days")
    gone = Store(store).prune(unused_since=time.time() - days * 86400)
    for kept in gone:
        _console().print(_kept(kept), markup=False, highlight=False, soft_wrap=True)
    freed = sum(kept.size for kept in gone) / 1e6
    _console().print(f"deleted {len(gone)} entries, {freed:.1f} MB", markup=False, highlight=False)


def _kept(kept: Kept) -> str:
    return f"{kept.kind:10} {kept.size / 1e6:10.1f} MB {(time.time() - kept.used) / 86400:8.1f} days  {kept.path}"


@app.command()
def schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    from qeff_validate.config.loader import schema as text

    sys.stdout.write(text())


def _write(made: Report, folder: Path) -> ValidateError | None:
    """Write the report; a failure is returned, so that what was found out is still printed."""
    try:
        made.write(folder)
    except ValidateError as exc:
        return exc
    return None


def _chosen(cases: list[Case], names: list[str]) -> list[Case]:
    known = [case.name for case in cases]
    for name in names:
        if name not in known:
            raise ConfigError(f"--case: no case is called {name!r}.{suggest(name, known)}")
    return [case for case in cases if not names or case.name in names]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"--device-ids: {text[:40]!r} is no card id; give numbers such as 0,1")
    return int(text)


def _known_runtimes(names: list[str]) -> list[str]:
    from qeff_validate.protocols import registered

    known = registered("runtimes")
    for name in names:
        if name not in known:
            raise ConfigError(f"--require: no runtime is called {name!r}.{suggest(name, known)}")
    return names


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    # a pipe has no width: let lines be as long as they are
    return console if console.is_terminal else Console(stderr=stderr, width=200)


class Terminal:
    """Progress on stderr: a spinner on a terminal, one line a step elsewhere."""

    def __init__(self, verbose: bool) -> None:
        self._console = _console(stderr=True)
        self._verbose = verbose

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show a step while it lasts, and how long it took if that was long."""
        start = time.perf_counter()
        try:
            with self._console.status(text) if self._console.is_terminal and not self._verbose else nullcontext():
                yield
        finally:
            signals.raise_if_received()  # a library may have turned the interruption into an error of its own
        seconds = time.perf_counter() - start
        if seconds >= 0.5:
            self._console.print(f"{text}: {seconds:.1f} s", markup=False, highlight=False)

    def line(self, text: str) -> None:
        """Show a line of a child's output if it was asked for."""
        if self._verbose:
            self._console.print(f"  | {text}", markup=False, highlight=False)


# newer versions of typer carry click within themselves, older ones import it: ask the exception for its base
_Usage: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def run_command(args: list[str] | None) -> int:
    """Run a command and return its exit code; nothing but the exit of a signal comes out of it."""
    with safe_streams():
        return _exit_code(args)


def _exit_code(args: list[str] | None) -> int:
    try:
        signals.raise_on_signals()
        code = typer.main.get_command(app).main(args=args, prog_name="qeff-validate", standalone_mode=False)
        sys.stdout.flush()
    except ConfigError as exc:
        code = _complain(exc, 2)
    except ValidateError as exc:
        code = _complain(exc, 3)
    except (typer.Abort, KeyboardInterrupt):
        code = signals.EXIT_CODES[signal.SIGINT]
    except SystemExit as exc:
        code = exc.code
    except _Usage as exc:
        exc.show()
        code = exc.exit_code
    except Exception:  # python's own exit code for it is 1, which here means a mismatch
        if signals.exit_code() is None:  # else a library has made an error of the interruption
            traceback.print_exc()
            code = _complain("this is a bug of qeff-validate, not a verdict on a model; please report it", 3)
    interrupted = signals.exit_code()
    if interrupted is not None or code == signals.EXIT_CODES[signal.SIGINT]:
        code = signals.EXIT_CODES[signal.SIGINT] if interrupted is None else interrupted
        _complain("interrupted; finished artifacts are in the store, nothing is half-written", code)
    return int(code or 0)


def _complain(problem: object, code: int) -> int:
    _console(stderr=True).print(f"qeff-validate: {problem}", markup=False, highlight=False, soft_wrap=True)
    return code
