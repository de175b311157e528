# SPDX-License-Identifier: Apache-2.0
"""The units of work that cases consist of, and which has to wait for which: plain data, nothing is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qeff_validate.config.case import Case
from qeff_validate.protocols import Runtime, capabilities

JUDGES = "run"
"""The stage that runs a case on a runtime and judges it; all others make what it takes from the store."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One stage of a case, which a worker does in one go.

    Attributes:
        case: its name.
        stage: ``reference``, ``measure``, ``export``, ``compile`` or ``run``.
        runtime: of ``compile`` and ``run``, else empty.
        needs: ids of the units that come first.
        shares: units of the same text read and write the same entries of the store, so one runs at a time; empty: none.
        cards: how many real cards it takes.
    """

    case: str
    stage: str
    runtime: str = ""
    needs: tuple[str, ...] = ()
    shares: str = ""
    cards: int = 0

    @property
    def id(self) -> str:
        """Name it uniquely, such as ``minilm-mean: compile on sim``."""
        return f"{self.case}: {self.stage}{f' on {self.runtime}' if self.runtime else ''}"


def is_usable_here(runtime: Runtime) -> bool:
    """Return whether a runtime can be used on this host."""
    return runtime.probe() is None


def plan(
    planned: Sequence[tuple[Case, str]],
    runtime: Callable[[str], Runtime],
    is_usable: Callable[[Runtime], bool] = is_usable_here,
) -> list[Unit]:
    """Return the units of cases on runtimes, each after those that it needs.

    Args:
        planned: cases and names of runtimes, in the order of the report.
        runtime: returns the runtime of a name.
        is_usable: whether a runtime can be used; one that cannot has nothing but `JUDGES`.
    """
    cases = {case.name: case for case, _ in planned}
    return [
        unit
        for case in cases.values()
        for unit in _units(case, {name: runtime(name) for other, name in planned if other is case}, is_usable)
    ]


def is_real_card(runtime: Runtime) -> bool:
    """Return whether a runtime runs programs on cards that are not simulated."""
    able = capabilities(runtime)
    return able.sdk is not None and not able.simulated


def _units(case: Case, runtimes: dict[str, Runtime], is_usable: Callable[[Runtime], bool]) -> Iterator[Unit]:
    name, body = case.name, _body(case)
    usable = {key: item for key, item in runtimes.items() if is_usable(item)}
    for key in runtimes.keys() - usable.keys():
        yield Unit(name, JUDGES, key)  # it tells why not
    if not usable:
        return
    reference = Unit(name, "reference", shares=body)
    yield reference
    first: tuple[str, ...] = (reference.id,)
    if case.tolerance != "table" and case.artifacts.reference is None:
        measured = Unit(name, "measure", needs=first, shares=body)
        yield measured
        first = (*first, measured.id)
    exported: tuple[str, ...] = ()
    if case.artifacts.onnx is None and any(item.kind != "module" for item in usable.values()):
        export = Unit(name, "export")
        yield export
        exported = (export.id,)
    for key, item in usable.items():
        needs = (*first, *(exported if item.kind != "module" else ()))
        if item.kind == "qpc" and case.artifacts.qpc is None:
            compiled = Unit(name, "compile", key, exported)
            yield compiled
            needs = (*first, compiled.id)
        yield Unit(name, JUDGES, key, needs, cards=case.compile.num_devices if is_real_card(item) else 0)


def _body(case: Case) -> str:
    """Return what tells apart the bodies and inputs whose hidden states cases share in the store."""
    parts = [case.source, case.inputs.model_dump(mode="json"), case.seed]
    return f"body {hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"
