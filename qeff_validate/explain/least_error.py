# SPDX-License-Identifier: Apache-2.0
"""Searches for the number with which a hypothesis fits best, such as a factor or a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def least(error: Callable[[float], float], candidates: Sequence[float] | Any) -> float:
    """Return where an error is least: the best of some increasing numbers, then a search between its neighbours."""
    values = [float(value) for value in candidates]
    errors = [error(value) for value in values]
    at = int(np.argmin(errors))
    low, high = values[max(0, at - 1)], values[min(len(values) - 1, at + 1)]
    ratio = (5**0.5 - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
        if high - low < 1e-7:
            break
    return (low + high) / 2
