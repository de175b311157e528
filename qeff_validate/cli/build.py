# SPDX-License-Identifier: Apache-2.0
"""The command ``build``: compile QPCs into a bundle for another host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qeff_validate.cli.options import CaseNames, Configs, SdkPrefix, StoreDir, Verbose, select_cases
from qeff_validate.cli.progress import console, print_text, terminal_progress


def build(
    configs: Configs,
    bundle: Annotated[Path, typer.Option(help="output directory; must not exist yet")],
    runtime: Annotated[str, typer.Option(help="ai100 or sim: the compiler to use and the runtime to run on")],
    case: CaseNames = None,
    sdk: SdkPrefix = None,
    store: StoreDir = None,
    verbose: Verbose = False,
) -> None:
    """Build QPCs with recorded inputs and references, to be run on a host without torch and compiler.

    On that host: [bold]qeff-validate run --bundle DIR[/]
    """
    from qeff_validate.engine import bundle as write_bundle
    from qeff_validate.engine import load
    from qeff_validate.protocols import Settings

    cases = select_cases(load(configs), case or [])
    digest = write_bundle(
        cases, bundle, runtime, store=store, settings=Settings(sdk=sdk), progress=terminal_progress(store, verbose)
    )
    console().print(f"bundle of {len(cases)} cases for {runtime}: {bundle}", markup=False, soft_wrap=True)
    print_text(f"digest: {digest}")
