# SPDX-License-Identifier: Apache-2.0
"""Microscaling formats, OCP MX v1.0: blocks of 32 values that share one power of two (card-contract §7).

A block's scale is 2^(floor(log2(greatest magnitude)) − emax), where emax is the exponent of the element type's greatest
value. Each value is divided by the scale, rounded half to even to an element, and saturated. Everything else is exact,
so the results here are exactly the decompressed values of such a block.

* **MXFP6**: E2M3 elements, emax 2: multiples of 1/8 below 2, of 1/4 below 4, of 1/2 up to 7.5. For weights.
* **MXINT8**: multiples of 1/64 up to ±127/64, emax 0. For keys and values. Also as ONNX nodes, which run in the graph.

The last block of an axis may be shorter. A block that holds NaN or infinity becomes NaN.

Unknown properties of the card, which may differ: the axis of its blocks, the rounding to an element, whether the scale
depends on the greatest magnitude alone, and the treatment of a short block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

Floats = npt.NDArray[np.float32]

BLOCK = 32
FP6_MAX, FP6_EMAX = 7.5, 2
INT8_STEP, INT8_MAX = 2.0**-6, 127 * 2.0**-6


def mxfp6(values: Floats, axis: int) -> Floats:
    """Round float32 values to MXFP6, with blocks along an axis; the result is float32."""
    return _in_blocks(values, axis, FP6_EMAX, _e2m3)


def mxint8(values: Floats) -> Floats:
    """Round float32 values to MXINT8, with blocks along the last axis; the result is float32."""
    return _in_blocks(values, -1, 0, _int8)


def _e2m3(scaled: Floats) -> Floats:
    exponent = np.frexp(scaled)[1] - 1
    step = np.ldexp(np.float32(1), np.clip(exponent, 0, FP6_EMAX) - 3)
    element: Floats = np.clip(np.rint(scaled / step) * step, -FP6_MAX, FP6_MAX)
    return element


def _int8(scaled: Floats) -> Floats:
    element: Floats = np.clip(np.rint(scaled / INT8_STEP) * INT8_STEP, -INT8_MAX, INT8_MAX)
    return element


def _in_blocks(values: Floats, axis: int, emax: int, rounded: Any) -> Floats:
    """Round values block by block; `rounded` maps scaled values to elements."""
    lines = np.moveaxis(values, axis, -1)
    length = lines.shape[-1]
    blocks = np.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, -length % BLOCK)])
    blocks = blocks.reshape(*lines.shape[:-1], -1, BLOCK)
    greatest = np.max(np.abs(blocks), axis=-1, keepdims=True)
    finite = np.isfinite(greatest)
    # frexp's exponent is floor(log2) + 1; the scale is an E8M0 number
    scale = np.clip(np.frexp(np.where(finite, greatest, 0))[1] - 1 - emax, -127, 127)
    values = np.where(finite, np.ldexp(rounded(np.ldexp(np.where(finite, blocks, 0), -scale)), scale), np.nan)
    values = values.reshape(*lines.shape[:-1], -1)[..., :length]
    return np.ascontiguousarray(np.moveaxis(values, -1, axis), dtype=np.float32)


def mxint8_nodes(source: str, target: str, width: int) -> tuple[list[Any], list[Any]]:
    """Return ONNX nodes that compute `mxint8` of a float32 value, and their constants.

    Args:
        source: name of the value.
        target: name of the result.
        width: last dim of the value.

    The power of two at or below the greatest magnitude m is fl(φm) − fl((1 − 2⁻²⁴)·fl(φm)) with φ = 2²³ + 1, exact in
    float32 for all values of fp16. A logarithm would be wrong exactly where m is a power of two.
    """
    size = min(BLOCK, width)
    padding = -width % size
    values: dict[str, Any] = {
        "step": np.float32(INT8_STEP),
        "low": np.float32(-127),
        "high": np.float32(127),
        "zero": np.float32(0),
        "one": np.float32(1),
        "phi": np.float32(2.0**23 + 1),
        "below": np.float32(1 - 2.0**-24),
        "last": np.array([-1]),
        "lines": np.array([-1, width]),
        "blocks": np.array([-1, (width + padding) // size, size]),
    }
    steps: list[tuple[str, tuple[str, ...], str]] = [
        ("Reshape", ("x", "lines"), "line"),
        ("Reshape", ("line", "blocks"), "block"),
        ("Abs", ("block",), "magnitude"),
        ("ReduceMax", ("magnitude", "last"), "top"),
        # ONNX Runtime's ReduceMax may miss a NaN.
        ("ReduceSum", ("magnitude", "last"), "sum"),
        ("Mul", ("sum", "zero"), "fine"),
        ("Add", ("top", "fine"), "m"),
        ("Equal", ("m", "zero"), "empty"),
        ("Where", ("empty", "one", "m"), "greatest"),
        ("Mul", ("greatest", "phi"), "q"),
        ("Mul", ("q", "below"), "r"),
        ("Sub", ("q", "r"), "scale"),
        ("Mul", ("scale", "step"), "unit"),
        ("Div", ("block", "unit"), "scaled"),
        ("Round", ("scaled",), "rounded"),
        ("Clip", ("rounded", "low", "high"), "element"),
        ("Mul", ("element", "unit"), "y"),
        ("Shape", ("x",), "shape"),
        ("Reshape", ("y", "shape"), "out"),
    ]
    if padding:
        values |= {"pads": np.array([0, 0, 0, padding]), "padded": np.array([-1, width + padding])}
        values |= {"start": np.array([0]), "end": np.array([width])}
        steps[1:2] = [("Pad", ("line", "pads"), "wide"), ("Reshape", ("wide", "blocks"), "block")]
        steps[-1:] = [
            ("Reshape", ("y", "padded"), "long"),
            ("Slice", ("long", "start", "end", "last"), "cut"),
            ("Reshape", ("cut", "shape"), "out"),
        ]
    names = {"x": source, "out": target}

    def name(short: str) -> str:
        return names.get(short, f"{target}/sim.mx.{short}")

    nodes = [
        helper.make_node(operator, [name(short) for short in inputs], [name(output)], name=name(output))
        for operator, inputs, output in steps
    ]
    return nodes, [numpy_helper.from_array(np.asarray(array), name(short)) for short, array in values.items()]
