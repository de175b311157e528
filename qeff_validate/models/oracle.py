# SPDX-License-Identifier: Apache-2.0
"""Pooling in numpy, for the reference. It shares no line with `pooling`, which is what is judged.

Each function takes the hidden states of the real tokens of one row, ``[n, hidden]`` with n ≥ 1, and returns
``[hidden]`` in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qeff_validate.metrics import Floats

POOLINGS: Mapping[str, Callable[[Floats], Floats]] = {
    "mean": lambda tokens: np.asarray(np.mean(tokens, axis=0)),
    "max": lambda tokens: np.asarray(np.max(tokens, axis=0)),
    "cls": lambda tokens: tokens[0],
}


def pool(tokens: Floats, pooling: str, *, normalize: bool) -> Floats:
    """Pool the real tokens of one row as the model's authors define it."""
    vector = POOLINGS[pooling](np.asarray(tokens, dtype=np.float64))
    return vector / np.linalg.norm(vector) if normalize else vector
