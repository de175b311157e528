# SPDX-License-Identifier: Apache-2.0
"""What is wrong outside of a graph: rows in the wrong place, outputs changed on their way, feeds, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.differences import CLOSE, difference
from qeff_validate.explain.locate import Location
from qeff_validate.explain.names import common_module
from qeff_validate.protocols import Session
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import RETAINED, Array, Tensors

SAME = 1e-4
"""Relative L2 below which two rows hold the same vector."""

ADAPTER_PARTS = ("lora_", "hada_", "lokr_", "ia3_", "vera_", "oft_", "randlora_", "boft_")
"""Beginnings of the parts of PEFT's names that belong to an adapter, not to a module of the model."""

HALF_CLOSE = 2e-3
"""Relative L2 up to which a factor explains a tensor that is held in fp16."""

BESIDE = "rows depend on the rows of their batch"
"""The finding where a file gives the same wrong rows again, but only with all others beside them."""

UNEXPLAINED = "rows differ, first row"
"""Part of a finding that tells rows, and not what is wrong with them."""

OTHER_ROW = 0.1
"""Part of its own error below which a row's distance to another row counts as that row's."""


def outside_finding(expected: Array, actual: Array, labels: Sequence[str]) -> str:
    """Return how the outputs of a runtime differ from those that its file gives when it is run again.

    Args:
        expected: of the file, ``[rows, n]``.
        actual: of the runtime.
        labels: of the rows.
    """
    if expected.shape != actual.shape:
        return f"the output has shape {list(actual.shape)} instead of {list(expected.shape)}"
    wrong = [row for row in range(len(expected)) if not relative_error(expected[row], actual[row]) <= SAME]
    moved = _other_rows(expected, actual, wrong)
    if moved:
        row, source = next(iter(moved.items()))
        first = f"first row {row} ({labels[row]!r}) that of row {source}"
        return f"{len(moved)} of {len(expected)} rows hold another row's output, {first}"
    if not wrong:
        return BESIDE
    text = difference(expected[wrong], actual[wrong])
    if text.startswith("differs by") or "values differ" in text:
        return f"{len(wrong)} of {len(expected)} {UNEXPLAINED} {wrong[0]} ({labels[wrong[0]]!r})"
    return (
        f"output {text}"
        if len(wrong) == len(expected)
        else f"output of {len(wrong)} rows, first row {wrong[0]}: {text}"
    )


def _other_rows(expected: Array, actual: Array, wrong: Sequence[int]) -> dict[int, int]:
    """Return for each wrong row the row whose output it holds."""
    found = {}
    for row in wrong:
        own = relative_error(expected[row], actual[row])
        distances = [relative_error(other, actual[row]) if other.any() else np.inf for other in expected]
        nearest = int(np.argmin(distances))
        if nearest != row and np.isfinite(own) and distances[nearest] < min(OTHER_ROW * own, OTHER_ROW):
            found[row] = nearest
    return found


class ReadingSession(SessionWrapper):
    """A session that reads back the tensors of the adapters that it is fed, and keeps those that differ.

    Args:
        session: open.
        adapters: tensors of ``base`` and of each adapter, by name.
        half: the runtime computes in fp16, so that it holds them rounded.
    """

    def __init__(self, session: Session, adapters: Mapping[str, Tensors], *, half: bool = False) -> None:
        super().__init__(session)
        known = {spec.name for spec in session.outputs}
        self._adapters = adapters
        self._half = half
        self._names = [name for name in next(iter(adapters.values())) if f"{name}{RETAINED}" in known]
        self._read: dict[str, int] = {}
        self._differences: dict[str, dict[str, str]] = {}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run, and compare what is read back with what was fed."""
        fed = [name for name in self._names if name in feeds]
        wanted = [spec.name for spec in self.outputs] if fetch is None else list(fetch)
        outputs = dict(self.session.run(feeds, fetch=[*wanted, *(f"{name}{RETAINED}" for name in fed)]))
        owner = (
            next((name for name, tensors in self._adapters.items() if _holds(tensors, feeds, fed)), "") if fed else ""
        )
        if owner and owner not in self._differences:
            self._differences[owner] = {}
            for name in fed:
                text = self._difference(owner, name, feeds[name], outputs[f"{name}{RETAINED}"])
                if text:
                    self._differences[owner][name] = text
        return {name: outputs[name] for name in wanted}

    def _difference(self, owner: str, name: str, expected: Array, held: Array) -> str:
        others = {f"adapter {other!r}": tensors[name] for other, tensors in self._adapters.items() if other != owner}
        others |= {key: array for key, array in self._adapters[owner].items() if key != name and array.any()}
        rounded = {key: self._as_held(array) for key, array in others.items()}
        close = HALF_CLOSE if self._half else CLOSE
        return difference(self._as_held(expected), held.astype(np.float32), rounded, close)

    def _as_held(self, array: Array) -> Array:
        with np.errstate(over="ignore"):
            return (array.astype(np.float16) if self._half else array).astype(np.float32)

    def location(self) -> Location | None:
        """Return the module whose tensors differ, and how; None if none do."""
        for owner, differences in self._differences.items():
            if not differences:
                continue
            name, text = next(iter(differences.items()))
            count = f"{len(differences)} of {len(self._names)} tensors" if len(differences) > 1 else f"tensor {name}"
            modules = sorted({module_of(key) for key in differences})
            common = common_module(modules) if len(differences) < len(self._names) else ""
            place = common if common in modules or common.rpartition(".")[2].isdecimal() else None
            return Location(place, f"{count} of adapter {owner!r}: {text}")
        return None


def _holds(tensors: Tensors, feeds: Tensors, names: Sequence[str]) -> bool:
    return all(np.array_equal(tensors[name].astype(feeds[name].dtype), feeds[name]) for name in names)


def module_of(name: str) -> str:
    """Return the path of the module that an adapter's tensor belongs to, from PEFT's saved name.

    Examples:
        >>> module_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
        'base_model.model.model.layers.0.self_attn.q_proj'
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if i > 1 and part.startswith(ADAPTER_PARTS)), len(parts) - 1)
    return ".".join(parts[:at])
