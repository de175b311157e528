# SPDX-License-Identifier: Apache-2.0
"""The ceiling: the effect of faults of fixed size on the original model, and which of them a verdict's bounds find.

A bound from noise alone may be so wide that faults fit under it (validation-methods §12.1). So the mutants with
``ceiling`` are tried on the original model in float32, on the case's own inputs, and their errors are stored with the
floor. A fault is found if one of its errors exceeds its bound. If a gross fault is not found, the bounds cannot tell a
faulty model from a correct one.
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
"""A fault is equivalent, that is, invisible, if its effect is below this multiple of the floor on every row."""

SIZES = ("rel_l2", "all_error", "score_error")
"""The metrics that measure the size of an effect: of vectors, of logits, and of scores."""


@dataclass(frozen=True, slots=True)
class FaultEffects:
    """The errors that faults cause in the original model.

    Attributes:
        names: of the mutants that apply to the model.
        gross: names of those that nobody may ship.
        errors: for each metric the error of the worst row with each mutant against the float64 reference, float64
            ``[mutants]``.
    """

    names: tuple[str, ...]
    gross: tuple[str, ...]
    errors: Mapping[str, Floats]

    def stored(self) -> dict[str, Any]:
        """Return the tensors that `from_stored` reads."""
        lists = {"names": self.names, "gross": self.gross}
        texts = {key: np.frombuffer("\n".join(names).encode(), dtype=np.uint8) for key, names in lists.items()}
        return {**texts, **{f"errors.{name}": array for name, array in self.errors.items()}}

    @classmethod
    def from_stored(cls, tensors: Tensors) -> FaultEffects:
        """Return the effects from the tensors of `stored`.

        Raises:
            IncomparableError: a tensor is missing, or of another dtype or shape.
        """
        names, gross = (tuple(filter(None, text_of(tensors, key).split("\n"))) for key in ("names", "gross"))
        errors = {name: array for name, array in tensors.items() if name.startswith("errors.")}
        for name, array in errors.items():
            if array.dtype != np.float64 or array.shape != (len(names),):
                raise IncomparableError(f"the faults' {name!r} are no numbers of {len(names)} faults, float64 [faults]")
        return cls(names, gross, {name.removeprefix("errors."): np.asarray(array) for name, array in errors.items()})

    def visible(self, floor: Floor) -> Iterator[int]:
        """Yield the indices of the faults that are not equivalent in the precision of a floor."""
        for size in set(SIZES) & set(self.errors):
            threshold = EQUIVALENT * floor.level(size)
            yield from (index for index, error in enumerate(self.errors[size]) if not error < threshold)

    def power(self, floor: Floor, judged: Sequence[GateResult]) -> Power:
        """Return how many of the visible faults the bounds of a verdict find; loads no framework."""
        bounds = {
            item.metric.name.partition(".")[2]: item.bound.value for item in judged if item.bound and item.bound.value
        }
        gates = [name for name in self.errors if name in bounds]
        visible = list(self.visible(floor))
        # NaN exceeds every bound
        missed = [
            self.names[index] for index in visible if all(self.errors[name][index] <= bounds[name] for name in gates)
        ]
        return Power(len(visible), tuple(missed), tuple(name for name in missed if name in self.gross))


def faults_key() -> str:
    """Return a digest of the code of the faults and of the measurement of their effects."""
    folder = Path(__file__).resolve().parent
    return fingerprint(digest_tree(folder, suffixes=(".py",)))


def ceiling_mutants(kind: str) -> tuple[Mutant, ...]:
    """Return the mutants of a model kind that are tried on the original model in each run."""
    return tuple(mutant for mutant in mutants(kind) if mutant.ceiling)


def measure_fault_effects(kind: str, model: Any, exact: Tensors, reference: Tensors, inputs: Any) -> FaultEffects:
    """Run the original model of a wrapper (`protocols.Measured`) with each `ceiling_mutants`, and measure the errors.

    Args:
        kind: of the model.
        model: the wrapper.
        exact: the reference in float64.
        reference: the reference in float32.
        inputs: of the wrapper.
    """
    names: list[str] = []
    faults = ceiling_mutants(kind)
    errors: list[Mapping[str, float]] = []
    with np.errstate(all="ignore"):
        for name, outputs in model.faulty_runs(inputs, reference, faults):
            names.append(name)
            errors.append(model.measure(exact, outputs, inputs))
    metrics = errors[0] if errors else {}
    gross = {fault.name for fault in faults if fault.gross}
    return FaultEffects(
        tuple(names),
        tuple(filter(gross.__contains__, names)),
        {name: np.array([by_metric[name] for by_metric in errors], dtype=float) for name in metrics},
    )
