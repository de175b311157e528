# SPDX-License-Identifier: Apache-2.0
"""Compares many values of one size with an expected one by a sample of their elements.

A decoder of 30 layers has hundreds of values and a thousand candidates for each. Most differ in a few elements already,
so that only the rest is compared in all that is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SAMPLED = 2048
"""Elements of a value that are compared."""

FEW = 64
"""Elements of a sample that are compared first."""


def sampled(array: Any) -> Any:
    """Return about `SAMPLED` elements of an array, as a copy; the same places of arrays of one size."""
    return array.ravel()[:: max(1, array.size // SAMPLED)].copy()


class Samples:
    """Samples of values of one size.

    Args:
        values: by name, of any shapes.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._rows_of = {name: row for row, name in enumerate(values)}
        self._samples = np.stack([sampled(value) for value in values.values()])
        step = max(1, self._samples.shape[1] // FEW)
        self._few = np.ascontiguousarray(self._samples[:, ::step])
        self._step = step

    def rows(self, names: Sequence[str]) -> Any:
        """Return what `errors` takes for some of the values, int64."""
        return np.array([self._rows_of[name] for name in names], dtype=np.int64)

    def errors(self, rows: Any, expected: Any, limit: float = np.inf) -> Any:
        """Return the relative L2 errors of some values, float64, of which infinity stands for all above a limit.

        Elements that are not finite are left out; of a value that has few others, the error is infinite.

        Args:
            rows: from `rows`.
            expected: as large as each value.
            limit: above which errors need not be told apart.
        """
        sample = sampled(expected)
        norm = float(np.linalg.norm(sample)) or 1.0
        # the error of a part is no greater than that of the whole
        near = _lengths(self._few[rows] - sample[:: self._step]) <= limit * norm
        differences = self._samples[rows[near]] - sample
        errors = np.full(len(rows), np.inf)
        enough = np.isfinite(differences).mean(axis=1) > 0.1
        errors[near] = np.where(enough, _lengths(differences) / norm, np.inf)
        return errors


def _lengths(differences: Any) -> Any:
    """Return the L2 norm of each row, without elements that are not finite."""
    return np.linalg.norm(np.where(np.isfinite(differences), differences, 0), axis=1)
