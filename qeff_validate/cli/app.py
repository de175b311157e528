# SPDX-License-Identifier: Apache-2.0
"""The typer application and the exit codes of all commands; those of a run are `Report.exit_code`."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from qeff_validate.cli import compare, merge, performance, plan, sdk, signals, store
from qeff_validate.cli.build import build
from qeff_validate.cli.configs import list_cases, schema
from qeff_validate.cli.doctor import doctor
from qeff_validate.cli.explain import EPILOG as EXPLAIN_EPILOG
from qeff_validate.cli.explain import explain
from qeff_validate.cli.init import init
from qeff_validate.cli.options import EPILOG
from qeff_validate.cli.output_streams import safe_streams
from qeff_validate.cli.progress import Color, print_text, print_wrapped, set_color
from qeff_validate.cli.run import run
from qeff_validate.cli.selftest import selftest
from qeff_validate.cli.tune import EPILOG as TUNE_EPILOG
from qeff_validate.cli.tune import tune
from qeff_validate.errors import ConfigError, ValidateError, naming_extras

app = typer.Typer(
    name="qeff-validate",
    help="Prove that a Hugging Face model says the same on PyTorch, ONNX Runtime and Qualcomm Cloud AI 100.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_text(f"qeff-validate {version('qeff-validate')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
    color: Annotated[Color, typer.Option(help="colour of the output; auto: on a terminal without NO_COLOR")] = "auto",
) -> None:
    """Prove that a Hugging Face model says the same on PyTorch, ONNX Runtime and Qualcomm Cloud AI 100."""
    set_color(color)


app.command()(init)
app.command(epilog=EPILOG)(run)
app.command(epilog=EXPLAIN_EPILOG)(explain)
app.command(epilog=TUNE_EPILOG)(tune)
app.command(epilog="Exit codes: 0 every goal was reached · 1 one was not · 2 wrong usage or config · 3 an error.")(
    selftest
)
app.command(epilog="Exit codes: 0 the bundle is there · 2 wrong usage or config · 3 something could not be built.")(
    build
)
app.command(epilog=merge.EPILOG)(merge.merge)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command("list", epilog="Exit codes: 0 the configs are sound · 2 one of them is not.")(list_cases)
app.command()(doctor)
app.add_typer(store.app, name="store")
app.add_typer(sdk.app, name="sdk")
app.command()(schema)
app.command(epilog=compare.EPILOG)(compare.compare)
app.command(epilog=performance.EPILOG)(performance.perf)
app.add_typer(performance.app, name="baseline")

# newer versions of typer contain a copy of click, older ones import it: take the base class from the exception
_UsageError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def run_command(args: list[str] | None) -> int:
    """Run a command and return its exit code.

    Args:
        args: command line without the program's name; None: ``sys.argv``.
    """
    with safe_streams():
        return _exit_code(args)


def _exit_code(args: list[str] | None) -> int:
    try:
        signals.raise_on_signals()
        with naming_extras():
            code = typer.main.get_command(app).main(args=args, prog_name="qeff-validate", standalone_mode=False)
        sys.stdout.flush()
    except ConfigError as exc:
        code = _print_error(exc, 2)
    except ValidateError as exc:
        code = _print_error(exc, 3)
    except (typer.Abort, KeyboardInterrupt):
        code = signals.EXIT_CODES[signal.SIGINT]
    except SystemExit as exc:
        code = exc.code
    except _UsageError as exc:
        exc.show()
        code = exc.exit_code
    except Exception:  # Python's own exit code for it is 1, which here means a mismatch
        if signals.exit_code() is None:  # else a library has replaced the interruption by an exception of its own
            traceback.print_exc()
            code = _print_error("this is a bug of qeff-validate, not a verdict on a model; please report it", 3)
    interrupted = signals.exit_code()
    if interrupted is not None or code == signals.EXIT_CODES[signal.SIGINT]:
        code = signals.EXIT_CODES[signal.SIGINT] if interrupted is None else interrupted
        _print_error("interrupted; finished artifacts are in the store, nothing is half-written", code)
    return int(code or 0)


def _print_error(problem: object, code: int) -> int:
    print_wrapped(f"qeff-validate: {problem}", stderr=True)
    return code
