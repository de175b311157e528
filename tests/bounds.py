# SPDX-License-Identifier: Apache-2.0
"""Bounds on rounding in tests. Each leaves a factor of 5 above what the kernels of several processors give.

`make test-kernels` names a file in ``QEFF_TEST_RATIOS``, where every comparison then adds a line: the test, and the
ratio of error to bound.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

HEADROOM = 5
"""What a bound is to leave between itself and the worst error under `kernels.VARIANTS`."""


def within(error: Any, bound: float, what: str = "") -> None:
    """Assert that errors are at most the bound; NaN is not.

    Args:
        error: a number or an array of them, not negative.
        bound: the greatest allowed.
        what: names the comparison in a failure.
    """
    worst = float(np.max(np.asarray(error, dtype=np.float64)))
    _record(worst / bound)
    assert worst <= bound, f"{what or 'error'} {worst:.3g}, allowed {bound:.3g}"


def close(actual: Any, wanted: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str = "") -> None:
    """Assert |actual − wanted| ≤ atol + rtol·|wanted| in each element of arrays or tensors of one shape.

    NaN and infinities must be equal; a single number is wanted of all elements.
    """
    got, want = _array(actual), _array(wanted)
    want = np.broadcast_to(want, got.shape) if want.ndim == 0 else want
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(same, 0.0, np.abs(got - want) / (atol + rtol * np.abs(want)))
    worst = float(np.max(ratios, initial=0.0))  # NaN stays NaN
    _record(worst)
    if not worst <= 1:
        at = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
        raise AssertionError(f"{what} {got[at]!r} at {at}, wanted {want[at]!r}: {worst:.3g} times the bound".strip())


def one_step(actual: Any, wanted: Any, rtol: float, atol: float = 0.0) -> None:
    """Assert that rounded numbers are at most one step of their format apart, as sums in another order may be.

    A step is a whole one on every machine, so it needs no headroom and is not recorded.
    """
    np.testing.assert_allclose(_array(actual), _array(wanted), rtol=rtol, atol=atol)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _record(ratio: float) -> None:
    file = os.environ.get("QEFF_TEST_RATIOS")
    if file:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps([test, ratio]) + "\n")
