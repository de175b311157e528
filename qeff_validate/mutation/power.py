# SPDX-License-Identifier: Apache-2.0
"""The ceiling: what faults of fixed size do to the original model, and so which of them a verdict's bounds would find.

A bound from noise alone may be so wide that faults fit under it (validation-methods §12.1). So the mutants that are
marked for it are tried on the original model in float32, on the case's own inputs, and their errors are kept beside the
floor. A fault is found if one of its errors is beyond its bound; one that is not, though nobody may ship it, means that
the bounds cannot discriminate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.artifact import digest_tree, fingerprint
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import GateResult, Power
from qeff_validate.errors import IncomparableError
from qeff_validate.json_tensor import text_of
from qeff_validate.mutation.mutant import Mutant, mutants
from qeff_validate.tensors import Tensors

EQUIVALENT = 2.0
"""A fault whose effect is below so many times the floor on every row changes nothing that could be seen."""

SIZES = ("rel_l2", "all_error")
"""The metric that an effect is measured by: that of embeddings, and that of logits."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What faults do to the original model.

    Attributes:
        names: of the mutants that apply to it.
        gross: those of them that nobody may ship.
        errors: for each metric the worst row with each of them, against the float64 reference.
    """

    names: tuple[str, ...]
    gross: tuple[str, ...]
    errors: Mapping[str, Floats]

    def stored(self) -> dict[str, Any]:
        """Return it as tensors."""
        words = {"names": self.names, "gross": self.gross}
        texts = {key: np.frombuffer("\n".join(names).encode(), dtype=np.uint8) for key, names in words.items()}
        return {**texts, **{f"errors.{name}": array for name, array in self.errors.items()}}

    @classmethod
    def from_stored(cls, tensors: Tensors) -> Ceiling:
        """Read what `stored` gave.

        Raises:
            IncomparableError: a tensor is missing, or of another dtype or shape.
        """
        names, gross = (tuple(filter(None, text_of(tensors, key).split("\n"))) for key in ("names", "gross"))
        errors = {name: array for name, array in tensors.items() if name.startswith("errors.")}
        for name, array in errors.items():
            if array.dtype != np.float64 or array.shape != (len(names),):
                raise IncomparableError(f"the faults' {name!r} are no numbers of {len(names)} faults, float64 [faults]")
        return cls(names, gross, {name.removeprefix("errors."): np.asarray(found) for name, found in errors.items()})

    def visible(self, floor: Floor) -> Iterator[int]:
        """Yield the places of those that are not equivalent in a precision."""
        for size in set(SIZES) & set(self.errors):
            least = EQUIVALENT * floor.level(size)
            yield from (at for at, value in enumerate(self.errors[size]) if not value < least)

    def power(self, floor: Floor, judged: Sequence[GateResult]) -> Power:
        """Return which of the visible faults the bounds of a verdict would find; loads no framework."""
        bounds = {
            item.metric.name.partition(".")[2]: item.bound.value for item in judged if item.bound and item.bound.value
        }
        gates = [name for name in self.errors if name in bounds]
        seen = list(self.visible(floor))
        # NaN is beyond every bound
        missed = [self.names[at] for at in seen if all(self.errors[name][at] <= bounds[name] for name in gates)]
        return Power(len(seen), tuple(missed), tuple(name for name in missed if name in self.gross))


def faults_key() -> str:
    """Return a digest of what faults are and how their effect is measured."""
    folder = Path(__file__).resolve().parent
    return fingerprint(digest_tree(folder, suffixes=(".py",)))


def tried(kind: str) -> tuple[Mutant, ...]:
    """Return the mutants of a model kind that are tried in each run."""
    return tuple(mutant for mutant in mutants(kind) if mutant.ceiling)


def measured(kind: str, made: Any, exact: Tensors, reference: Tensors, inputs: Any) -> Ceiling:
    """Try the mutants of a model kind on the original model of a wrapper (`protocols.Measured`)."""
    names: list[str] = []
    faults = tried(kind)
    errors: list[Mapping[str, float]] = []
    with np.errstate(all="ignore"):
        for name, outputs in made.altered(inputs, reference, faults):
            names.append(name)
            errors.append(made.measure(exact, outputs, inputs))
    metrics = errors[0] if errors else {}
    gross = {fault.name for fault in faults if fault.gross}
    return Ceiling(
        tuple(names),
        tuple(filter(gross.__contains__, names)),
        {name: np.array([each[name] for each in errors], dtype=float) for name in metrics},
    )
