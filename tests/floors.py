# SPDX-License-Identifier: Apache-2.0
"""Floors made by hand, for tests of bounds whose limit is known without measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.tensors import Tensors

EVEN: Mapping[str, float] = {"rel_l2": 1e-3, "cosine": 1e-6, "norm_ratio": 1e-3, "max_abs_rms": 1e-2}
"""One size of each row metric; runs that are all alike have this very size as their limit."""


def made_floor(
    errors: Mapping[str, float | Sequence[float]] = EVEN,
    *,
    profile: str = "fp16",
    systematic_errors: Mapping[str, float | Sequence[float]] | None = None,
    center: Tensors | None = None,
    of: str = "by hand",
) -> Floor:
    """Return the floor of eight runs with these errors; a single number is that of all of them."""

    def eight(values: Mapping[str, float | Sequence[float]]) -> dict[str, np.ndarray]:
        return {name: np.full(8, value) if np.ndim(value) == 0 else np.array(value) for name, value in values.items()}

    systematic = eight(systematic_errors or {"mean_signed": 1e-4, "mean_norm": 1e-5})
    return Floor(profile, of, eight(errors), systematic, center or {})
