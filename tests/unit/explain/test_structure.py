# SPDX-License-Identifier: Apache-2.0
"""Terms of a sum that are counted otherwise: a residual, or what an adapter adds to its layer."""

from __future__ import annotations

import numpy as np
import pytest

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.reference_values import ReferenceValue
from qeff_validate.explain.structure import sum_finding

FIRST, SECOND, OTHER = np.random.default_rng(0).normal(size=(3, 1, 4, 8))


def value(module: str, array: object) -> ReferenceValue:
    return ReferenceValue(module, array, (module, "out", 0, 0))


@pytest.mark.parametrize(
    ("observed", "text"),
    [
        (SECOND, "the residual, what norm gives, is left out of the sum"),
        (FIRST + 2 * SECOND, "what output gives, is scaled by 2 in the sum"),
        (FIRST + OTHER, ""),
    ],
)
def test_term_of_a_sum(observed: object, text: str) -> None:
    values = [value("norm", FIRST), value("other", OTHER), value("output", SECOND), value("layer", FIRST + SECOND)]
    assert sum_finding(values, 3, observed, relative_error, 1e-6) == text


@pytest.mark.parametrize(
    ("factor", "text"),
    [(0, "what q.lora_B gives, is left out of the sum"), (1, "what q.lora_B gives, is scaled by 0.25 in the sum")],
)
def test_scale_of_an_adapter(factor: float, text: str) -> None:
    values = [value("q.base_layer", FIRST), value("q.lora_B", SECOND), value("q", FIRST + 4 * SECOND)]
    assert sum_finding(values, 2, FIRST + factor * SECOND, relative_error, 1e-6) == text
