# SPDX-License-Identifier: Apache-2.0
"""Keeps relations that held in the store, under everything that they depend on, so that they are not run again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_validate.artifact import fingerprint
from qeff_validate.builders.source_keys import package_key
from qeff_validate.files import read_bytes
from qeff_validate.pipeline.machine import KERNELS, machine_fingerprint
from qeff_validate.protocols import Runtime, Settings, capabilities
from qeff_validate.registry import is_built_in, registered
from qeff_validate.report.result import Result

if TYPE_CHECKING:
    from qeff_validate.pipeline.case_artifacts import CaseArtifacts

FILE = "result.json"

MOST_BYTES = 16 << 20
"""A greater result is not read."""

KEPT = "kept in the store: it held before, for the same files, inputs, bounds, code, versions and machine"


class _NotKept(Exception):
    """Carries a result that is not to be kept out of the making of an entry."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.status)
        self.result = result


def kept_relation(
    artifacts: CaseArtifacts, runtime: Runtime, settings: Settings, name: str, judge: Callable[[], Result]
) -> Result:
    """Return the result of a relation: that of the store if it held (or did not apply) before, else of a run.

    Cards, plug-ins and models in memory are judged each time: what they compute with is in no key. So is what failed.

    Args:
        artifacts: of the case.
        runtime: where the relation is judged; one that `protocols.runtime` made.
        settings: that it was made with.
        name: of the relation.
        judge: runs and judges it.
    """
    if not _can_be_kept(artifacts, runtime):
        return judge()

    def make(folder: Path) -> None:
        result = judge()
        if result.status not in ("pass", "not_run"):
            raise _NotKept(result)
        (folder / FILE).write_text(json.dumps(result.plain(), allow_nan=False), encoding="utf-8")

    try:
        entry = artifacts.store.entry("relation", _key(artifacts, runtime, settings, name), make)
    except _NotKept as exc:
        return exc.result
    result = Result.from_plain(json.loads(read_bytes(entry.path / FILE, most_bytes=MOST_BYTES)))
    notes = result.notes if entry.made else (*result.notes, KEPT)
    return replace(result, case=artifacts.case.name, notes=notes)


def _can_be_kept(artifacts: CaseArtifacts, runtime: Runtime) -> bool:
    able = capabilities(runtime)
    card = able.sdk is not None and not able.simulated
    entries = (registered("runtimes").get(runtime.name), registered("models").get(artifacts.case.model))
    ours = all(entry is not None and is_built_in(entry) for entry in entries)
    return ours and not card and not artifacts.in_memory


def _key(artifacts: CaseArtifacts, runtime: Runtime, settings: Settings, name: str) -> dict[str, Any]:
    case = artifacts.case
    opened: str | None = None  # the module is made from the model, in the same code
    if runtime.kind != "module":
        opened = artifacts.artifact(runtime.kind, capabilities(runtime).sdk).digest
    written = case.model_dump(mode="json", exclude={"name", "marks", "expect", "performance", "runtimes"})
    key = {
        "relation": name,
        "runtime": runtime.name,
        "artifact": opened,
        "model": artifacts.body_key(),
        "case": written,
        "inputs": artifacts.stored_inputs()[1].digest,
        "code": package_key(),
        "machine": machine_fingerprint(asdict(settings)),
        "kernels": {variable: os.environ[variable] for variable in KERNELS if variable in os.environ},
    }
    return {"relation": name, "runtime": runtime.name, "all": fingerprint(key)}
