# SPDX-License-Identifier: Apache-2.0
"""The rows that bounds are measured on, where there are many, and what the rows that are left out would have added.

An error's limit is that of the worst row. Rows of one model differ little in how much rounding moves them, so some
dozens of rows show how errors are distributed, and the expected maximum of the others follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats

MOST = 48
"""Rows that are measured at most."""

EXTREMES = 4
"""So many of the shortest rows, of the longest and of the most sensitive are measured in any case."""


@dataclass(frozen=True, slots=True)
class DecisiveRows:
    """Which rows are measured.

    Attributes:
        rows: their numbers, ascending; rows without a token are among them.
        drawn: those that stand for the rows that are left out, because chance chose them.
        left_out: how many rows with a token are not measured.
    """

    rows: tuple[int, ...]
    drawn: tuple[int, ...] = ()
    left_out: int = 0


def decisive_rows(lengths: Sequence[int], sensitivity: Sequence[float], seed: int, most: int = MOST) -> DecisiveRows:
    """Choose the rows to measure: all if they are few, else the extremes and a sample that is spread over the lengths.

    Args:
        lengths: tokens of each row; rows without a token are measured besides, for they cost nothing.
        sensitivity: of each row to rounding, as far as the reference tells; only its order counts.
        seed: of the sample.
        most: rows with a token that are measured at most.
    """
    filled = [row for row, length in enumerate(lengths) if length]
    empty = [row for row, length in enumerate(lengths) if not length]
    if len(filled) <= most:
        return DecisiveRows(tuple(range(len(lengths))))
    by_length = sorted(filled, key=lambda row: lengths[row])
    by_sensitivity = sorted(filled, key=lambda row: sensitivity[row])
    extremes = {*by_length[:EXTREMES], *by_length[-EXTREMES:], *by_sensitivity[-EXTREMES:]}
    others = [row for row in by_length if row not in extremes]
    strata = np.array_split(np.array(others), most - len(extremes))  # of nearly equal size, one row of each
    drawn = np.random.default_rng(seed).random(len(strata))
    sample = sorted(int(part[int(at * len(part))]) for part, at in zip(strata, drawn, strict=True))
    rows = tuple(sorted({*empty, *extremes, *sample}))
    return DecisiveRows(rows, tuple(sample), len(filled) - len(extremes) - len(sample))


def expected_maximum(count: int) -> float:
    """Return the expected greatest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def worst_of_all(measured: Floats, drawn: Floats, left_out: int) -> Floats:
    """Return the worst error of all rows in each run, from those of the measured rows.

    Errors above the median are taken as log-normal: ln(max / median) of n rows is s times the expected maximum of n
    normal numbers, and s is averaged over the runs, which see the same rows. The greatest of the rows that are left out
    is then expected at median · exp(s · expected maximum of their number). On 240 sentences and MiniLM, limits from 48
    rows were 0.63 to 1.7 times those of all rows in fp16 and 0.72 to 2.5 times in fp32 (the norm is overestimated).

    Args:
        measured: the worst of all measured rows, float64 ``[runs]``.
        drawn: errors of the rows that chance has drawn, float64 ``[runs, rows]``; NaN stays NaN.
        left_out: rows that were not measured.
    """
    if not left_out:
        return measured
    with np.errstate(all="ignore"):
        middle = np.median(drawn, axis=1)
        slope = np.log(np.max(drawn, axis=1) / np.maximum(middle, 1e-300)).mean() / expected_maximum(drawn.shape[1])
        others = middle * np.exp(slope * expected_maximum(left_out)) if left_out > 1 else middle
        worst: Floats = np.maximum(measured, others)
    return worst
