# SPDX-License-Identifier: Apache-2.0
"""How an output is made from the right one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qeff_validate.explain.outputs import output_finding

RIGHT = np.random.default_rng(0).normal(size=(4, 6, 8))


def relative(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda x: 0 * x, "its output is zero"),
        (lambda x: 0 * x + 0.3, "its output is 0.3 everywhere"),
        (lambda x: np.repeat(x[1:2], 4, axis=0), "its output is the same for every row"),
        (lambda x: -x, "its output is scaled by -1"),
        (lambda x: x - 0.25, "its output has -0.25 added"),
        (lambda x: np.roll(x, 1, axis=0), "rows of its output are shifted by 1"),
        (lambda x: np.roll(x, -1, axis=0), "rows of its output are shifted by -1"),
        (lambda x: x[[1, 0, 2, 3]], "rows of its output are in another order, or other rows"),
        (lambda x: np.roll(x, 1, axis=-1), "columns of its output are shifted by 1"),
        (lambda x: np.roll(x, 4, axis=-1), "columns of its output are shifted by 4"),
        (lambda x: x[..., ::-1].copy(), "columns of its output are in reverse order"),
        (np.abs, "its output goes through abs"),
        (np.tanh, "its output goes through tanh"),
        (lambda x: np.clip(x, -0.5, 0.5), "its output is clipped at 0.5"),
        (lambda x: np.where(np.arange(8) == 3, 0, x), "1 of 8 columns of its output, first column 3, are zero"),
        (lambda x: np.where(x > 1, np.nan, x), f"{(RIGHT > 1).sum()} of {RIGHT.size} values of its output are NaN"),
        (lambda x: x, ""),
        (np.square, ""),
    ],
)
def test_what_befell_an_output_is_told(change: Callable[[np.ndarray], np.ndarray], finding: str) -> None:
    told = output_finding(RIGHT, change(RIGHT), None, relative, 1e-6)
    assert told.startswith(finding) if finding else told == ""
