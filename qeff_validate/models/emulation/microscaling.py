# SPDX-License-Identifier: Apache-2.0
"""The original model as it is with weights in MXFP6, or keys and values in MXINT8, so that their noise is measured.

This is no part of the simulator and shares no code with it: elements are looked up in a table, and the operations are
torch's, in the original model of Hugging Face. So its outputs say what the format costs, whoever is judged by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache

BLOCK = 32
"""Numbers that share a scale, in all formats of OCP MX v1.0."""

E2M3 = torch.tensor(
    [*(n / 8 for n in range(16)), *(n / 4 for n in range(8, 16)), *(n / 2 for n in range(8, 16))], dtype=torch.float32
)
"""The magnitudes of FP6 E2M3 by their codes: subnormals and three octaves of eight numbers each."""

INT8 = torch.arange(128, dtype=torch.float32) / 64
"""The magnitudes of MXINT8's elements."""

# which operand of a product may be a weight, and the dim that is summed over
_PRODUCTS: Mapping[Callable[..., Any], tuple[tuple[int, int], ...]] = {
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


def in_blocks(values: Tensor, table: Tensor, dim: int, block: int = BLOCK) -> Tensor:
    """Return the nearest numbers that blocks along a dim can hold, ties to even codes; all finite.

    Args:
        values: float32.
        table: magnitudes of the element type, ascending by code; the last one's octave sets the scale.
        dim: where blocks lie; the last of them may be shorter.
        block: how many numbers share a scale.
    """
    lines = values.movedim(dim, -1)
    size = lines.shape[-1]
    blocks = nn.functional.pad(lines, (0, -size % block)).reshape(*lines.shape[:-1], -1, block).contiguous()
    octave = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - torch.frexp(table[-1]).exponent
    scaled = torch.ldexp(blocks, -octave)
    middles = (table[1:] + table[:-1]) / 2
    code = torch.bucketize(scaled.abs(), middles)
    tie = scaled.abs() == middles[code.clamp(max=len(middles) - 1)]
    code = torch.where(tie & (code % 2 == 1), code + 1, code).clamp(max=len(table) - 1)
    found = torch.ldexp(table[code].copysign(scaled), octave)
    return found.flatten(-2)[..., :size].movedim(-1, dim)


class CompressedWeights(TorchFunctionMode):
    """While it is entered, products read the weights of a model as MXFP6 holds them; the weights stay as they are.

    Args:
        model: whose parameters are the weights; adapters that are put on it later are none of them.
        but: names of parameters that are not.
        block: how many numbers share a scale.
    """

    def __init__(self, model: nn.Module, but: frozenset[str] = frozenset(), block: int = BLOCK) -> None:
        super().__init__()
        self._block = block
        kept = ((name, parameter) for name, parameter in model.named_parameters() if name not in but)
        self._weights = {parameter.untyped_storage().data_ptr() for _, parameter in kept if parameter.ndim > 1}
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self.used: set[int] = set()
        """Storages of the weights that products have read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the weights among the operands of a product."""
        operands = list(args)
        for at, dim in _PRODUCTS.get(func, ()):
            if at < len(operands) and operands[at].untyped_storage().data_ptr() in self._weights:
                operands[at] = self._compressed(operands[at], dim)
        return func(*operands, **(kwargs or {}))

    def _compressed(self, weight: Tensor, dim: int) -> Tensor:
        place = weight.untyped_storage().data_ptr()
        key = (place, weight.storage_offset(), weight.shape, weight.stride(), dim)
        self.used.add(place)
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = in_blocks(weight.detach(), E2M3, dim, self._block)
        return self._made[key]


class CompressedCache(DynamicCache):  # type: ignore[misc]  # transformers is Any to mypy here
    """transformers' own cache, into which keys and values are written as MXINT8 holds them."""

    block = BLOCK
    """How many numbers share a scale."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compress along the last dim, and keep."""
        held = [in_blocks(states, INT8, -1, self.block) for states in (key_states, value_states)]
        return super().update(*held, *args, **kwargs)
