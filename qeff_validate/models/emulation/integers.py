# SPDX-License-Identifier: Apache-2.0
"""Emulates products of integers and weights that are stored in them, in the original model, to measure their noise.

Shares no code with ONNX Runtime or the simulator: what an operation reads is quantized and dequantized, and the
operation is torch's own, so that sums are exact but for rounding, as those of integers are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qeff_validate.config.case import Precision
from qeff_validate.config.file_precision import IntegerFormat, integer_format
from qeff_validate.models.emulation.ensemble import ENSEMBLE
from qeff_validate.models.emulation.microscaling import PRODUCTS, CompressedWeights
from qeff_validate.models.emulation.precision import DEPENDS_ON_WEIGHTS

LOOKUPS = {nn.functional.embedding: 1, torch.embedding: 0}
"""Lookups of tables, with the place of the table among their operands."""


def quantized(values: Tensor, bits: int, *, symmetric: bool, dims: tuple[int, ...] | None = None) -> Tensor:
    """Quantize and dequantize values: to nearest, ties to even.

    Args:
        values: float32, finite.
        bits: of an element.
        symmetric: zero is stored as zero, and the greatest magnitude as the greatest integer; else smallest and
            greatest value, or zero, are the ends.
        dims: dims of the elements that share a scale; None: all.
    """
    dims = tuple(range(values.ndim)) if dims is None else dims
    if symmetric:
        most = float(2 ** (bits - 1) - 1)
        scale = values.abs().amax(dims, keepdim=True) / most
        scale = torch.where(scale > 0, scale, 1.0)
        return (values / scale).round().clamp(-most, most) * scale
    low = values.amin(dims, keepdim=True).clamp(max=0)
    scale = (values.amax(dims, keepdim=True).clamp(min=0) - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round()
    return ((values / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def quantized_blocks(values: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize blocks along the last dim without zero points, as 4-bit weights are commonly stored.

    The element of greatest magnitude becomes the least integer, which has no positive counterpart.
    """
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    most = 2 ** (bits - 1)
    scale = torch.where(extreme != 0, extreme / -most, 1.0)
    return (values / scale).round().clamp(-most, most - 1) * scale


class IntegerProducts(CompressedWeights):
    """Function mode in which operations read weights, tables and activations as integers; weights are left unchanged.

    Args:
        model: its parameters are quantized; adapters that are added later are not.
        numbers: how.
        but: names of parameters that are not quantized.
    """

    def __init__(self, model: nn.Module, numbers: IntegerFormat, but: frozenset[str] = frozenset()) -> None:
        super().__init__(model, but)
        self._numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Quantize the operands of a matrix product with a weight, or the table of a lookup."""
        operands, numbers = list(args), self._numbers
        if func in LOOKUPS and numbers.tables and self.is_weight(operands[LOOKUPS[func]]):
            operands[LOOKUPS[func]] = self._compressed(operands[LOOKUPS[func]], -1)
        if numbers.attention and func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        places = [index for index, _ in PRODUCTS.get(func, ()) if index < len(operands)]
        if numbers.attention and len(places) == 2 and not any(self.is_weight(operands[index]) for index in places):
            for index in places:
                operands[index] = _dynamic(operands[index])
            return func(*operands, **(kwargs or {}))
        for index, dim in PRODUCTS.get(func, ()) if numbers.products else ():
            if index >= len(operands) or not self.is_weight(operands[index]):
                continue
            operands[index] = self._compressed(operands[index], dim)
            other = index - 1 if dim == -2 or func is nn.functional.linear else index + 1
            if numbers.activations:
                operands[other] = _dynamic(operands[other])
        return func(*operands, **(kwargs or {}))

    def _quantize(self, lines: Tensor) -> Tensor:
        """Return the weight whose last dim is reduced, quantized and dequantized."""
        numbers, size = self._numbers, lines.shape[-1]
        block = numbers.block or size
        dims = (-1,) if numbers.per_channel or numbers.block else None
        compressed = self._allocate(lines.shape, dtype=torch.float32)
        with _disable_current_modes():  # in which quotients would be rounded
            blocks = nn.functional.pad(lines, (0, -size % block)).reshape(*lines.shape[:-1], -1, block)
            if numbers.block and numbers.symmetric:
                numerals = quantized_blocks(blocks, numbers.bits)
            else:
                numerals = quantized(blocks, numbers.bits, symmetric=numbers.symmetric, dims=dims)
            compressed.copy_(numerals.flatten(-2)[..., :size])
        setattr(compressed, DEPENDS_ON_WEIGHTS, True)
        return compressed


def _dynamic(values: Tensor) -> Tensor:
    """Return activations as dynamic quantization reads them: uint8, one scale for the whole batch."""
    with _disable_current_modes(), torch.no_grad():
        read = quantized(values.detach(), 8, symmetric=False)
    if hasattr(values, DEPENDS_ON_WEIGHTS):
        setattr(read, DEPENDS_ON_WEIGHTS, True)
    return read


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return `torch.nn.functional.scaled_dot_product_attention` with the operands of both products quantized."""
    assert dropout_p == 0, "the model is not in training"
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = _dynamic(query) @ _dynamic(key).transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    hidden = scores.isneginf().all(-1, keepdim=True)  # of a query that sees nothing, attention is zero
    return _dynamic(scores.softmax(-1).masked_fill(hidden, 0.0)) @ _dynamic(value)


def compressed_weights(
    model: nn.Module, precision: Precision, but: frozenset[str] = frozenset()
) -> Mapping[int, AbstractContextManager[Any]]:
    """Return, by the block size of a variant, the context in which products read the weights of a precision.

    Args:
        model: the model.
        precision: measurable.
        but: names of parameters that are left as they are.
    """
    blocks = {variant.block for variant in ENSEMBLE} if precision.weights else set()
    numbers = integer_format(precision)
    if numbers is not None:
        return dict.fromkeys(blocks, IntegerProducts(model, numbers, but))
    return {block: CompressedWeights(model, but, block) for block in blocks}
