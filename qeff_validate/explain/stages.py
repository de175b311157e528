# SPDX-License-Identifier: Apache-2.0
"""At which stage between the reference and the runtime an error is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.report.explanation import StageShare
from qeff_validate.tensors import Array

FLOAT32 = "float32"
"""What float32 adds to the float64 reference; it is never to blame."""

GUILTY = 0.5
"""Share of the error from which a stage is named."""


def stage_shares(outputs: Sequence[tuple[str, Array]]) -> tuple[StageShare, ...]:
    """Return what each stage adds to the error of the last output.

    With e_i the difference that a stage makes and e their sum, its share is ⟨e_i, e⟩ / ⟨e, e⟩. Shares add up to 1;
    stages that cancel each other have shares outside [0, 1]. Where values are not finite, the first stage that gives
    such has all of the error.

    Args:
        outputs: name of a stage and its outputs, of one shape; the first is the reference and no stage.

    Examples:
        >>> one, two, three = np.zeros(2), np.array([1.0, 0.0]), np.array([1.0, 1.0])
        >>> [(stage.name, stage.share) for stage in stage_shares([("", one), ("export", two), ("runtime", three)])]
        [('export', 0.5), ('runtime', 0.5)]
    """
    names = [name for name, _ in outputs]
    arrays: list[Floats] = [np.asarray(array, dtype=np.float64).ravel() for _, array in outputs]
    finite = [bool(np.isfinite(array).all()) for array in arrays]
    norm = float(np.linalg.norm(arrays[0])) or 1.0
    if not all(finite):
        first = finite.index(False)
        return tuple(
            StageShare(name, float(place == first), float("inf") if place >= first else _size(arrays, place, norm))
            for place, name in enumerate(names[1:], start=1)
        )
    total = arrays[-1] - arrays[0]
    square = float(total @ total)
    shares = []
    for place in range(1, len(arrays)):
        error = arrays[place] - arrays[place - 1]
        share = float(error @ total) / square if square else 0.0
        shares.append(StageShare(names[place], share, float(np.linalg.norm(error)) / norm))
    return tuple(shares)


def _size(arrays: Sequence[Floats], place: int, norm: float) -> float:
    return float(np.linalg.norm(arrays[place] - arrays[place - 1])) / norm


def guilty_stage(shares: Sequence[StageShare], expected: Mapping[str, float] | None = None) -> str | None:
    """Return the name of the stage with the greatest share; None if none makes half of the error.

    A stage that makes no more than is expected of it is left out, if another one makes more: the rounding of a device
    may hide a small fault in the graph from a norm, and not from a verdict.

    Args:
        shares: from `stage_shares`.
        expected: relative L2 of what a stage makes in a healthy run, by its name.
    """
    blamed = [stage for stage in shares if stage.name != FLOAT32]
    beyond = [stage for stage in blamed if not stage.error <= (expected or {}).get(stage.name, 0.0)]
    if not beyond:
        return None
    worst = max(beyond, key=lambda stage: stage.share)
    return worst.name if worst.share >= GUILTY or len(beyond) < len(blamed) else None
