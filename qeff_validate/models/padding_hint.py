# SPDX-License-Identifier: Apache-2.0
"""Detects failed verdicts in which only rows with padding are wrong. Numpy only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from qeff_validate.tensors import Tensors


def padding_hint(
    bad: Collection[int], padded: Collection[int], judged: Sequence[int], outputs: Tensors, precision: str
) -> str:
    """Return a hint if only rows with padding are wrong, and rows of full length were compared too; else an empty text.

    Args:
        bad: indices of rows that exceed a bound or are not finite.
        padded: indices of rows with padding.
        judged: indices of all compared rows.
        outputs: by name, ``[rows, …]``.
        precision: profile of the outputs.
    """
    full = [row for row in judged if row not in padded]
    if not bad or not full or not set(bad) <= set(padded):
        return ""
    broken = sum(not all(np.isfinite(array[row]).all() for array in outputs.values()) for row in bad)
    several = f"{len(bad)} of {len(judged) - len(full)} rows with padding"
    rest = f"all {len(full)} rows of full length are right"
    if not broken:
        return f"{several} are beyond their bounds, and {rest}: padding reaches what a row gives"
    what = "half precision ends at 65504" if precision.startswith("fp16") else f"this is {precision}"
    return (
        f"{several} are wrong, {broken} of them not finite, and {rest}: padding overflows ({what}; a mask of -inf or"
        " -3.4e38 that is added twice or multiplied by 0, a softmax over a place that sees nothing, and a sum over"
        " padded places give infinity or NaN)"
    )
