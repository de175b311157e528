# SPDX-License-Identifier: Apache-2.0
"""The command ``selftest``: the detection power and the false alarms of the verdicts, measured with mutants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_validate.cli.options import CaseNames, Configs, select_cases, split_list
from qeff_validate.cli.progress import console, print_text
from qeff_validate.errors import ConfigError, suggest
from qeff_validate.report.report import DEFAULT_DIR

if TYPE_CHECKING:
    from qeff_validate.config.case import Case
    from qeff_validate.selftest.score import Score


def selftest(
    configs: Configs,
    case: CaseNames = None,
    cases: Annotated[int, typer.Option(min=1, help="number of cases to take from the configs, evenly spread")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds per legitimate variant")] = 20,
    stage: Annotated[str, typer.Option(help="fp32, device (on the simulated card), or both")] = "fp32,device",
    report: Annotated[Path, typer.Option(help="directory for selftest.json and selftest.md")] = Path(DEFAULT_DIR),
) -> None:
    """Measure the verdicts: how many of some 80 deliberate faults they detect, and whether they raise false alarms.

    Every mutant goes through the whole pipeline, in float32 and as a compiled program on the simulated card; baseline
    checkers judge the same outputs. Goals: 98 % caught in float32, 90 % on the device, no false alarm. Takes minutes.

    Example: [bold]qeff-validate selftest configs/embedding.yaml --case bert-mean --seeds 3[/]
    """
    import json

    from qeff_validate.engine import load, selftest
    from qeff_validate.folders import check_writable
    from qeff_validate.report.result import finite
    from qeff_validate.report.writers import write_texts
    from qeff_validate.selftest.score import markdown

    stages = split_list(stage)
    for name in stages:
        if name not in ("fp32", "device"):
            raise ConfigError(f"--stage: no stage is called {name!r}.{suggest(name, ('fp32', 'device'))}")
    loaded = load(configs)
    selected = select_cases(loaded, case) if case else _spread([c for c in loaded if "slow" not in c.marks], cases)
    check_writable(report, "--report")
    title = ", ".join(path.name for path in configs)
    with console(stderr=True).status("starting") as status:
        score = selftest(selected, title=title, seeds=seeds, stages=stages, progress=status.update)  # type: ignore[arg-type]
    _print(score)
    text = json.dumps(finite(score.plain()), indent=1) + "\n"
    write_texts(report, {"selftest.json": text, "selftest.md": markdown(score)})
    console().print(f"report: {report / 'selftest.json'}, {report / 'selftest.md'}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if score.shortfalls() else 0)


def _spread(cases: list[Case], count: int) -> list[Case]:
    """Return at most ``count`` of the cases, evenly spread."""
    count = min(count, len(cases))
    return [cases[index * len(cases) // count] for index in range(count)]


def _print(score: Score) -> None:
    from rich.table import Table

    for title, columns, rows in score.tables():
        if rows:
            table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
            for row in rows:
                table.add_row(*row)
            console().print(table, "")
    for title, texts in (("survived", score.survivors()), ("not passed", score.false_alarms())):
        for text in texts:
            print_text(f"{title}: {text}")
    for text in score.shortfalls() or ["every goal was reached"]:
        print_text(text)
