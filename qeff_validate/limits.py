# SPDX-License-Identifier: Apache-2.0
"""From the errors of legitimate runs to a bound: a tolerance limit, times what held-out runs have shown to be needed.

Errors of runs that differ in rounding alone are close to log-normal. The limit T = exp(mean + k·s) of the logarithms of
n errors, with the one-sided factor k for 95 % of the population at 95 % confidence, is what all but a few further runs
of the same kind stay below (validation-methods §12.1). An artifact is of another kind, so a factor comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

K95: Mapping[int, float] = MappingProxyType({
    3: 7.656, 4: 5.144, 5: 4.203, 6: 3.708, 7: 3.399, 8: 3.187, 9: 3.031, 10: 2.911, 12: 2.736, 16: 2.524, 20: 2.396,
    32: 2.197,
})  # fmt: skip
"""One-sided 95/95 factors of the normal distribution by sample size (ISO 16269-6, table D.4)."""

LEAST = 1e-300
"""An error of zero has no logarithm."""


def tolerance_limit(errors: Sequence[float]) -> float:
    """Return the 95/95 limit of a sample of errors; infinity if one of them is not finite or there are fewer than 3."""
    values = np.asarray(errors, dtype=np.float64)
    if values.size < min(K95) or not np.isfinite(values).all():
        return float("inf")
    size = max(n for n in K95 if n <= values.size)
    logs = np.log(np.maximum(values, LEAST))
    return float(np.exp(logs.mean() + K95[size] * logs.std(ddof=1)))
