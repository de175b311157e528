# SPDX-License-Identifier: Apache-2.0
"""The command ``plan``: the units of work of a run, before it begins."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from qeff_validate.cli.options import Configs, SdkPrefix, StoreDir, matching_cases, runtime_names, shard
from qeff_validate.cli.progress import console, print_text

EPILOG = "Exit codes: 0 this is the plan · 2 wrong usage or config."


def plan(
    configs: Configs,
    keyword: Annotated[
        str | None, typer.Option("-k", help="plan only cases whose name contains this, or fits it with * and ?")
    ] = None,
    runtimes: Annotated[str | None, typer.Option(help="replaces the runtimes of the cases, e.g. torch,ort,sim")] = None,
    part: Annotated[
        str | None, typer.Option("--shard", metavar="K/N", help="plan only every N-th case, from the K-th on")
    ] = None,
    sdk: SdkPrefix = None,
    store: StoreDir = None,
    json_lines: Annotated[bool, typer.Option("--json", help="print each unit as a line of JSON alone")] = False,
) -> None:
    """Show what `run --jobs N` would do: each stage of each case, what it waits for, and its expected time and memory.

    Times and memory are those of the last run with this store; of what never ran, memory is estimated from the weights.

    Example: [bold]qeff-validate plan configs/quickstart.yaml[/]
    """
    from rich.table import Table

    from qeff_validate.builders.store import Store
    from qeff_validate.engine import load
    from qeff_validate.pipeline.executors.unit_costs import UnitCosts
    from qeff_validate.pipeline.executors.units import plan as planned_units
    from qeff_validate.pipeline.runner import Runner
    from qeff_validate.protocols import Settings

    cases = shard(matching_cases(load(configs), keyword), part)
    names = runtime_names(runtimes)
    runner = Runner(store=store, settings=Settings(sdk=sdk))
    units = planned_units([(case, name) for case in cases for name in names or case.runtimes], runner.runtime)
    costs, by_name = UnitCosts(Store(store).root), {case.name: case for case in cases}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, side in (("unit", "left"), ("after", "left"), ("seconds", "right"), ("MB", "right")):
        table.add_column(title, justify=side, overflow="fold")  # type: ignore[arg-type]
    for unit in units:
        seconds, megabytes = costs.seconds(unit), costs.megabytes(unit, by_name[unit.case])
        if json_lines:
            print_text(json.dumps({"id": unit.id, **asdict(unit), "seconds": seconds, "megabytes": round(megabytes)}))
        after = ", ".join(need.partition(": ")[2] for need in unit.needs)
        table.add_row(unit.id, after, "" if seconds is None else f"{seconds:.1f}", f"{megabytes:.0f}")
    if not json_lines:
        console().print(table)
