# SPDX-License-Identifier: Apache-2.0
"""The command ``doctor``: the installation and the usable runtimes."""

from __future__ import annotations

from qeff_validate.cli.options import SdkPrefix, StoreDir
from qeff_validate.cli.progress import print_text
from qeff_validate.errors import EXTRAS, ValidateError, missing_package


def doctor(sdk: SdkPrefix = None, store: StoreDir = None) -> None:
    """Show what is installed, which runtimes can be used here, and why the others cannot."""
    from qeff_validate.builders.store import Store
    from qeff_validate.engine import environment
    from qeff_validate.protocols import Settings, runtime
    from qeff_validate.registry import registered
    from qeff_validate.sdk.locate import installed

    settings = Settings(sdk=sdk)
    lines = ["versions"]
    versions = environment(settings)["versions"]
    for name, version in versions.items():
        absent = str(missing_package(name)) if name in EXTRAS else "not installed"
        lines.append(f"  {name:15} {version or absent}")
    lines.append("runtimes")
    lines += [f"  {name:15} {runtime(name, settings).probe() or 'usable'}" for name in sorted(registered("runtimes"))]
    ai100 = installed(sdk)
    lines += ["AI 100 SDK", f"  {'prefix':15} {ai100.prefix}{'' if ai100.prefix.is_dir() else ' (not there)'}"]
    try:
        lines.append(f"  {'compiler':15} {' '.join(ai100.compiler()[0])}")
    except ValidateError as exc:
        lines.append(f"  {'compiler':15} {exc}")
    lines += [f"  {name:15} {version or 'not installed'}" for name, version in ai100.versions().items()]
    for card in ai100.cards():
        lines.append(f"  {'QID ' + str(card.qid):15} {card.values.get('Status')}, free NSPs {card.free_cores}")
    lines += ["store", f"  {'directory':15} {Store(store).root}"]
    print_text("\n".join(lines))
