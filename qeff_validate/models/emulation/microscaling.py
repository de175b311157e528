# SPDX-License-Identifier: Apache-2.0
"""Emulates weights in MXFP6, and keys and values in MXINT8, in the original model, so that their noise can be measured.

Shares no code with the simulator: elements are looked up in a table, and the operations are torch's, in the original
Hugging Face model. So its outputs show the error of the format, independently of what is validated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache

from qeff_validate.models.emulation.float64 import is_large
from qeff_validate.models.scratch import PIECE, scratch_tensor

BLOCK = 32
"""Elements that share a scale, in all formats of OCP MX v1.0."""

E2M3 = torch.tensor(
    [*(n / 8 for n in range(16)), *(n / 4 for n in range(8, 16)), *(n / 2 for n in range(8, 16))], dtype=torch.float32
)
"""Magnitudes of FP6 E2M3 by code: subnormals and three octaves of eight values each."""

INT8 = torch.arange(128, dtype=torch.float32) / 64
"""Magnitudes of the elements of MXINT8 by code."""

PRODUCTS: Mapping[Callable[..., Any], tuple[tuple[int, int], ...]] = {
    nn.functional.linear: ((1, -1),),
    torch.matmul: ((0, -1), (1, -2)),
    torch.mm: ((0, -1), (1, -2)),
    torch.bmm: ((0, -1), (1, -2)),
    torch.addmm: ((1, -1), (2, -2)),
    torch.baddbmm: ((1, -1), (2, -2)),
    Tensor.matmul: ((0, -1), (1, -2)),
    Tensor.__matmul__: ((0, -1), (1, -2)),
    Tensor.mm: ((0, -1), (1, -2)),
    Tensor.bmm: ((0, -1), (1, -2)),
}
"""For each matrix product: the operands that may be weights, each with its reduced dim."""


def in_blocks(values: Tensor, table: Tensor, dim: int, block: int = BLOCK) -> Tensor:
    """Quantize and dequantize values in blocks along a dim: to nearest, ties to even codes; the result is finite.

    Args:
        values: float32, finite.
        table: magnitudes of the element type, ascending by code; the octave of the last one sets the scale.
        dim: the dim of the blocks; the last block may be shorter.
        block: elements that share a scale.
    """
    lines = values.movedim(dim, -1)
    size = lines.shape[-1]
    blocks = nn.functional.pad(lines, (0, -size % block)).reshape(*lines.shape[:-1], -1, block).contiguous()
    octave = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - torch.frexp(table[-1]).exponent
    scaled = torch.ldexp(blocks, -octave)
    midpoints = (table[1:] + table[:-1]) / 2
    code = torch.bucketize(scaled.abs(), midpoints)
    tie = scaled.abs() == midpoints[code.clamp(max=len(midpoints) - 1)]
    code = torch.where(tie & (code % 2 == 1), code + 1, code).clamp(max=len(table) - 1)
    quantized = torch.ldexp(table[code].copysign(scaled), octave)
    return quantized.flatten(-2)[..., :size].movedim(-1, dim)


class CompressedWeights(TorchFunctionMode):
    """Function mode in which matrix products read the weights of a model in MXFP6; the weights are left unchanged.

    Args:
        model: its parameters are compressed; adapters that are added later are not.
        but: names of parameters that are not compressed.
        block: elements that share a scale.
    """

    def __init__(self, model: nn.Module, but: frozenset[str] = frozenset(), block: int = BLOCK) -> None:
        super().__init__()
        self._block = block
        self._allocate = scratch_tensor if is_large(model) else torch.empty
        weights = (parameter for name, parameter in model.named_parameters() if name not in but and parameter.ndim > 1)
        # held, as the memory of one that is freed would be another tensor's, which then passed for a weight
        self._weights = {weight.untyped_storage().data_ptr(): weight for weight in weights}
        self._cache: dict[tuple[Any, ...], Tensor] = {}
        self.used: set[int] = set()
        """Data pointers of the weights that products have read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the weights among the operands of a matrix product."""
        operands = list(args)
        for index, dim in PRODUCTS.get(func, ()):
            if index < len(operands) and self.is_weight(operands[index]):
                operands[index] = self._compressed(operands[index], dim)
        return func(*operands, **(kwargs or {}))

    def is_weight(self, value: Tensor) -> bool:
        """Return whether a tensor is a weight of the model, or a view of one."""
        return value.untyped_storage().data_ptr() in self._weights

    def _compressed(self, weight: Tensor, dim: int) -> Tensor:
        storage = weight.untyped_storage().data_ptr()
        version = 0 if weight.is_inference() else weight._version  # an adapter may write into a weight of the base
        key = (storage, version, weight.storage_offset(), weight.shape, weight.stride(), dim)
        self.used.add(storage)
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = self._quantize(weight.detach().movedim(dim, -1)).movedim(-1, dim)
        return self._cache[key]

    def _quantize(self, lines: Tensor) -> Tensor:
        """Return a weight whose last dim is reduced, quantized and dequantized, float32."""
        compressed = self._allocate(lines.shape, dtype=torch.float32)
        step = max(1, PIECE * len(lines) // max(1, lines.numel()))
        for part, target in zip(torch.split(lines, step), torch.split(compressed, step), strict=True):
            target.copy_(in_blocks(part, E2M3, -1, self._block))
        return compressed


class CompressedCache(DynamicCache):  # type: ignore[misc]  # transformers is Any to mypy here
    """The dynamic cache of transformers, with keys and values in MXINT8."""

    block = BLOCK
    """Elements that share a scale."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compress keys and values along the last dim, and store them."""
        compressed = [in_blocks(states, INT8, -1, self.block) for states in (key_states, value_states)]
        return super().update(*compressed, *args, **kwargs)
