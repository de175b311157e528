# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of complex numbers (DeepSeek-V2, Llama-4) as products of real ones: ONNX has no complex operators.

The authors' code runs as it is. Where it makes complex tensors of real ones, it gets pairs of real tensors, which do
what it asks of them: products, and changes of shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qeff_validate.models.framework_calls import own_source

RESHAPING = frozenset({
    "contiguous", "expand", "flatten", "permute", "reshape", "squeeze", "to", "transpose", "unsqueeze", "view",
})  # fmt: skip
"""Methods that do the same to both parts."""


class Pair:
    """A complex tensor as its real and its imaginary part, float ``[…]`` each."""

    def __init__(self, real: Tensor, imaginary: Tensor) -> None:
        self.real, self.imag = real, imaginary

    def __mul__(self, other: Any) -> Pair:
        if isinstance(other, Pair):
            a, b, c, d = self.real, self.imag, other.real, other.imag
            return Pair(a * c - b * d, a * d + b * c)
        return Pair(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> Pair:
        return Pair(self.real[key], self.imag[key])

    def __getattr__(self, name: str) -> Any:
        if name in ("device", "ndim", "shape"):
            return getattr(self.real, name)
        if name not in RESHAPING:
            raise AttributeError(name)
        return lambda *args, **options: Pair(
            getattr(self.real, name)(*args, **options), getattr(self.imag, name)(*args, **options)
        )

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), options: Any = None) -> Any:
        if function is torch.view_as_real:
            (pair,) = args
            return torch.stack((pair.real, pair.imag), dim=-1)
        if function in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
            one, other = args
            return one * other if isinstance(one, cls) else other * one
        del options
        return NotImplemented


class RealRotations(TorchFunctionMode):
    """While it is entered, complex tensors that are made of real ones are `Pair`."""

    def __torch_function__(
        self, function: Any, _: Any, args: tuple[Any, ...] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.view_as_complex:
            (parts,) = args
            return Pair(parts[..., 0], parts[..., 1])
        if function is torch.polar:
            size, angle = args
            return Pair(size * angle.cos(), size * angle.sin())
        return function(*args, **(options or {}))


def has_complex_rotations(model: nn.Module) -> bool:
    """Return True if the file of a model's class makes complex tensors of real ones; also if it has no source."""
    return "view_as_complex" in (own_source(model) or "view_as_complex")
