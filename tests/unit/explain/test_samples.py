# SPDX-License-Identifier: Apache-2.0
"""Errors of many values of one size are those that numpy gives, and most values are told apart by a few elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qeff_validate.explain.samples import FEW, Samples, sampled

SIZE = 3 * 4000


def values() -> dict[str, Any]:
    """Return one value that is equal, one that is near, and others of the same size in another shape."""
    drawn = np.random.default_rng(0)
    equal = drawn.normal(size=(3, 4000)).astype(np.float32)
    near = equal * np.float32(1.001)
    others = {f"other {number}": drawn.normal(size=SIZE).astype(np.float32) for number in range(5)}
    broken = np.where(drawn.random(SIZE) < 0.5, np.nan, equal.ravel())
    return {"equal": equal, **others, "near": near, "half": broken, "none": np.full((4000, 3), np.inf, np.float32)}


def relative(actual: Any, expected: Any) -> float:
    """Return the relative L2 error of what is sampled, where it is finite."""
    actual, expected = np.float64(sampled(actual)), np.float64(sampled(expected))
    known = np.isfinite(actual)
    if known.mean() <= 0.1:
        return float("inf")
    return float(np.linalg.norm((actual - expected)[known]) / np.linalg.norm(expected))


@pytest.mark.parametrize("limit", [np.inf, 2e-3])
def test_errors_are_those_of_numpy_and_infinite_above_a_limit(limit: float) -> None:
    given = values()
    names = [name for name in given if name != "other 3"]
    expected = given["equal"].astype(np.float64)
    samples = Samples(given)
    errors = dict(zip(names, samples.errors(samples.rows(names), expected, limit), strict=True))
    right = {name: relative(given[name], expected) for name in names}
    assert right["near"] == pytest.approx(1e-3, rel=1e-3)
    assert right["half"] == 0
    for name, error in errors.items():
        assert error == pytest.approx(right[name] if right[name] <= limit else np.inf, rel=1e-12), name


def test_values_that_differ_in_a_few_elements_are_compared_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    isfinite = np.isfinite

    def counted(array: Any) -> Any:
        compared.append(np.size(array))
        return isfinite(array)

    given = values()
    samples = Samples(given)
    monkeypatch.setattr(np, "isfinite", counted)
    samples.errors(samples.rows([*given]), given["equal"], 2e-3)
    near = 4  # equal, near, and two that are mostly not finite
    assert sum(compared) <= len(given) * 2 * FEW + 2 * near * sampled(given["equal"]).size
