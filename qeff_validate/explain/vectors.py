# SPDX-License-Identifier: Apache-2.0
"""What may have befallen a vector of weights that is known from what a block computes, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

NEAR = 1e-2
"""Distance from a round number below which a factor or an addend is told as that number."""

FEW = 4
"""Elements that are told one by one."""

CLEAR = 0.05
"""Part of the greatest difference from which an element differs."""

SAME = 1e-3
"""Relative L2 up to which a vector is the right one."""

Vector = Any


def vector_hypotheses(expected: Vector, actual: Vector, others: Mapping[str, Vector]) -> Iterator[tuple[str, Vector]]:
    """Yield what a vector may be in place of the right one, with the vector that it then is exactly.

    Args:
        expected: the right vector.
        actual: the other one, up to rounding.
        others: vectors of the same size by name that may stand in its place.

    Yields:
        None that is the right one.

    Examples:
        >>> right = np.array([1.0, 2.0, 3.0])
        >>> [text for text, vector in vector_hypotheses(right, -2.001 * right, {}) if vector[0] < -1.9]
        ['scaled by -2']
    """
    least = SAME * float(np.linalg.norm(expected))
    for text, vector in _hypotheses(expected, actual, others):
        if np.linalg.norm(vector - expected) > least:
            yield text, vector


def _hypotheses(expected: Vector, actual: Vector, others: Mapping[str, Vector]) -> Iterator[tuple[str, Vector]]:
    norm = float(expected @ expected)
    factor = float(expected @ actual) / norm if norm else 0.0
    yield "is zero", np.zeros_like(expected)
    yield factor_text(factor), factor * expected
    name = min(others, key=lambda other: float(np.linalg.norm(others[other] - actual)), default=None)
    if name is not None:
        yield f"is that of {name}", others[name]
    added = float(np.mean(actual - expected))
    added = round(added) if abs(added - round(added)) < NEAR else added
    yield f"has {added:.4g} {'added' if added > 0 else 'taken off'}".replace("-", ""), expected + added
    same = float(np.mean(actual))
    same = round(same) if abs(same - round(same)) < NEAR else same
    yield f"is {same:.4g} everywhere", np.full_like(expected, same)
    for step in (1, -1):
        yield f"is shifted by {step}", np.roll(expected, step)
    errors = np.abs(actual - expected)
    places = np.flatnonzero(errors > CLEAR * errors.max(initial=0))
    if 0 < places.size <= max(1, expected.size // 2):
        told = expected.copy()
        told[places] = 0
        first = f"element {places[0]} is" if places.size == 1 else f"{places.size} elements, first {places[0]}, are"
        yield f"{first} zero", told
        factor = float(expected[places] @ actual[places]) / max(float(expected[places] @ expected[places]), 1e-30)
        if places.size > 1:
            told = expected.copy()
            told[places] *= factor
            yield f"{first} {factor_text(factor)}", told
    if 0 < places.size <= FEW:
        told = expected.copy()
        told[places] = actual[places]
        shown = ", ".join(f"[{place}] {actual[place]:.3g} instead of {expected[place]:.3g}" for place in places)
        yield f"has other elements: {shown}", told


def factor_text(factor: float) -> str:
    """Return a factor in words."""
    near = next((word for value, word in ((0, "zero"), (-1, "negated")) if abs(factor - value) < NEAR), "")
    return near or f"scaled by {factor:.4g}"
