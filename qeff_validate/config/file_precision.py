# SPDX-License-Identifier: Apache-2.0
"""The precision of a user's file, on a host or a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qeff_validate.config.case import Precision


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """How a file stores and multiplies numbers as integers.

    Attributes:
        bits: of a weight; 7 if the range of 8 bits is halved, against saturation in the sums of some processors.
        symmetric: zero is stored as zero; else each scale has a zero point.
        per_channel: each output feature has its scale; else each weight has one.
        block: number of elements along the reduced dim that share a scale; 0: there are no blocks.
        products: weights of matrix products are stored so.
        tables: embedding tables are.
        activations: the other operand of a product is quantized as it is met, to uint8 with one scale for all.
        attention: so are both operands of products of two activations.
    """

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = False
    block: int = 0
    products: bool = True
    tables: bool = False
    activations: bool = False
    attention: bool = False

    @property
    def may_saturate(self) -> bool:
        """Whether sums of two products may exceed 16 bits, in which some processors add them up."""
        return self.activations and self.symmetric and self.bits == 8


class FilePrecision(Precision):
    """The precision of a user's file; a case cannot ask for some of these."""

    compute: Literal["fp16", "fp32", "bf16"] = "fp32"  # type: ignore[assignment]
    weights: str | None = None  # type: ignore[assignment]
    integers: IntegerFormat | None = None
    """The format of ``weights``, if it can be emulated."""


def integer_format(precision: Precision) -> IntegerFormat | None:
    """Return the integers that a precision's weights are kept in; None if there are none that can be emulated."""
    return precision.integers if isinstance(precision, FilePrecision) else None
