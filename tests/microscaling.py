# SPDX-License-Identifier: Apache-2.0
"""MXFP6 and MXINT8 number by number, the elements by `ml_dtypes`: the oracle for blocks of the OCP MX formats."""

from __future__ import annotations

import ml_dtypes
import numpy as np

Array = np.ndarray


def scale_for(block: Array, emax: int) -> float:
    """Return the shared scale, searched for among the numbers of E8M0."""
    powers = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    fitting = powers[powers * 2.0**emax <= np.abs(block).max()]
    return float(fitting.max()) if fitting.size else float(powers.min())


def mxfp6(values: Array, axis: int) -> Array:
    """Return what MXFP6 leaves of values, with blocks along an axis."""
    return _blocks(values, axis, _fp6)


def mxint8(values: Array) -> Array:
    """Return what MXINT8 leaves of values, with blocks along the last axis."""
    return _blocks(values, -1, _int8)


def _fp6(block: Array) -> Array:
    scale = scale_for(block, 2)
    # the cast of ml_dtypes makes no numbers beyond 7.5 saturate
    return (np.clip(block / scale, -7.5, 7.5).astype(ml_dtypes.float6_e2m3fn).astype(np.float64)) * scale


def _int8(block: Array) -> Array:
    scale = scale_for(block, 0) / 64
    counts = np.array([round(number) for number in (block / scale).tolist()])  # Python rounds half to even
    return np.clip(counts, -127, 127) * scale


def _blocks(values: Array, axis: int, compress) -> Array:
    lines = np.moveaxis(values.astype(np.float64), axis, -1)
    found = np.empty_like(lines)
    for line in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], 32):
            found[line][start : start + 32] = compress(lines[line][start : start + 32])
    return np.moveaxis(found, -1, axis).astype(np.float32)
