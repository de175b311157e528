# SPDX-License-Identifier: Apache-2.0
"""The command ``explain``: where a result of one case comes from, stage by stage and layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.cli.options import SdkPrefix, StoreDir, Verbose, device_ids, select_cases
from qeff_validate.cli.progress import TerminalProgress, print_text, print_wrapped
from qeff_validate.errors import ConfigError

if TYPE_CHECKING:
    from qeff_validate.report.explanation import Explanation, ProgramSearch

SHOWN = 12
"""Layers that are printed: those with the greatest error over floor, in the order of the graph."""

EPILOG = (
    "Exit codes: 0 there is an explanation, and the bundle if one was asked for · 2 wrong usage or config · "
    "3 there is nothing to explain, or no bundle."
)


def explain(
    config: Annotated[Path, typer.Argument(help="YAML config file", metavar="CONFIG")],
    case: Annotated[str, typer.Option("--case", help="the case")],
    runtime: Annotated[str, typer.Option("--runtime", help="the runtime, e.g. ort, sim, ai100")],
    devices: Annotated[str, typer.Option("--device-ids", help="cards to use, e.g. 0,1")] = "",
    sdk: SdkPrefix = None,
    store: StoreDir = None,
    repro: Annotated[
        Path | None, typer.Option("--repro", help="new directory for a bundle that shows the error by itself")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print the explanation as JSON alone")] = False,
    verbose: Verbose = False,
) -> None:
    """Run one case on one runtime, and say where its error is made, whether or not it is beyond a bound.

    With --repro, the smallest part of the graph that shows the error is written with its inputs and outputs, a script
    that needs numpy and onnxruntime only, and a text for an issue tracker.

    Example: [bold]qeff-validate explain configs/quickstart.yaml --case minilm-mean --runtime sim[/]
    """
    from qeff_validate.engine import Runner, load
    from qeff_validate.protocols import Settings
    from qeff_validate.report.result import finite

    (selected,) = select_cases(load([config]), [case])
    settings = Settings(sdk=sdk, device_ids=device_ids(devices))
    runner = Runner(store=store, settings=settings, progress=TerminalProgress(verbose, quiet=json_output))
    if repro is not None:
        from qeff_validate.explain.repro import check_folder

        check_folder(repro)
    result = runner.explained(selected, runtime, repro=repro)
    explanation = result.explanation
    if json_output and explanation is not None:
        print_text(json.dumps(finite(explanation.to_plain()), ensure_ascii=False, allow_nan=False))
    else:
        print_wrapped(f"{case}-{runtime}: {result.status}{f': {result.reason}' if result.reason else ''}")
        for finding in result.findings:
            print_wrapped(f"finding: {finding}")
        for line in lines(explanation) if explanation is not None else []:
            print_wrapped(line)
    if explanation is None or (repro is not None and explanation.repro is None):
        if result.stage == "config":
            raise ConfigError(result.reason)
        raise typer.Exit(3)


def lines(explanation: Explanation) -> list[str]:
    """Return an explanation as text: stages, layers, and the sentence that sums it up."""
    text = ["", "stage                    share     error"]
    text += [f"{stage.name:<22} {stage.share:>7.1%}  {stage.error:8.1e}" for stage in explanation.stages]
    if explanation.row:
        text += ["", f"looked into {explanation.row}"]
    if explanation.layers:
        ratios = sorted((layer.local / layer.floor for layer in explanation.layers), reverse=True)
        least = ratios[min(SHOWN, len(ratios)) - 1]
        shown = [layer for layer in explanation.layers if layer.local / layer.floor >= least][:SHOWN]
        width = max(len(layer.module) for layer in shown)
        text += ["", f"{'module':<{width}}  {'operator':<20} inherited  made here  over floor"]
        text += [
            f"{layer.module:<{width}}  {layer.operator:<20} {layer.inherited:9.1e}  {layer.local:9.1e}"
            f"  {layer.local / layer.floor:10.3g}"
            for layer in shown
        ]
    if explanation.program is not None:
        text += ["", *_program_lines(explanation.program)]
    text += ["", f"{explanation.summary} [{explanation.seconds:.1f} s]"]
    if explanation.repro is not None:
        text.append(f"repro bundle: {explanation.repro} ({explanation.repro_note})")
    elif explanation.repro_note:
        text.append(f"no repro bundle was written: {explanation.repro_note}")
    return text


def _program_lines(search: ProgramSearch) -> list[str]:
    """Return the search inside a compiled program as text."""
    text = [
        f"inside the compiled program: {search.compilations} compilations; its outputs move by"
        f" {search.observer:.1e} when inner values are outputs too",
    ]
    width = max((len(item.module) for item in search.boundaries), default=0)
    return text + [
        f"{item.module:<{width}}  error {item.error:8.1e}  expected {item.expected:8.1e}" for item in search.boundaries
    ]
