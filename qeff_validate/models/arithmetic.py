# SPDX-License-Identifier: Apache-2.0
"""Runs the original model in another arithmetic: every operation in half precision, products summed in another order.

What such a run gives is as right as an artifact can be in that precision, and owes nothing to any artifact, exporter,
compiler or simulator: operations are torch's own, and only what goes into them is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Compute = Literal["fp32", "fp16", "bf16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRODUCTS = frozenset({"aten.addmm", "aten.bmm", "aten.linear", "aten.matmul", "aten.mm"})

KEPT = ("RMSNorm", "RotaryEmbedding")
"""Ends of names of classes that compute in float32 on a card too, because the compiler is asked for it (DESIGN §7)."""

FORBIDDEN = 1e38
"""Numbers beyond this stand for "not seen" in masks; a compiler makes them the greatest of its precision."""


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways in which the same model can legitimately be computed.

    Attributes:
        name: for provenance.
        attention: an attention implementation of transformers.
        parts: products are sums of so many partial products.
        seed: None rounds to nearest; else each rounding goes up or down at random, as far as it lies.
        batch: rows that run together, padded to the longest, last row first; 1: each row by itself.
    """

    name: str
    attention: str = "eager"
    parts: int = 1
    seed: int | None = None
    batch: int = 1


WAYS = (
    Way("sdpa", "sdpa"),
    Way("eager, 2 parts", parts=2),
    Way("eager, 4 parts, batch of 3", parts=4, batch=3),
    Way("sdpa, 8 parts, batch of 8", "sdpa", parts=8, batch=8),
    *(Way(f"eager, random rounding {seed}", seed=seed) for seed in range(1, 3)),
    *(Way(f"sdpa, random rounding {seed}", "sdpa", parts=2, seed=seed, batch=5) for seed in range(3, 5)),
)
"""The ensemble: kernels, orders of summation, batches, padding and roundings that differ from each other."""


class Arithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, operations read float32 numbers rounded to a precision, and sum products in parts.

    Args:
        compute: the precision; in fp32 only the way differs.
        way: how.
    """

    def __init__(self, compute: Compute, way: Way) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._way = DTYPES[compute], way
        self._drawn = None if way.seed is None else torch.Generator().manual_seed(way.seed)
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept = 0
        """How many modules that compute in float32 are being run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        given = kwargs or {}
        if not self.kept and self._dtype != torch.float32:
            args, given = tree_map(self._read, (args, given))
        name = str(func).rpartition(".")[0]
        if name in PRODUCTS and self._way.parts > 1:
            found = in_parts(name, self._way.parts, *args, **given)
        else:
            found = func(*args, **given)
        if name in PRODUCTS and self._drawn is not None and self._dtype == torch.float32:
            return self._blurred(found)
        return found

    def _read(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if isinstance(value, nn.Parameter):  # stored once, rounded to nearest
            if id(value) not in self._weights:
                self._weights[id(value)] = value, self._finite(value, value.detach().to(self._dtype))
            return self._weights[id(value)][1]
        return self._finite(value, value.to(self._dtype) if self._drawn is None else self._either(value))

    def _finite(self, value: Tensor, rounded: Tensor) -> Tensor:
        most = torch.finfo(self._dtype).max
        return torch.where(value.abs() > FORBIDDEN, value.sign() * most, rounded.to(torch.float32))

    def _either(self, value: Tensor) -> Tensor:
        """Round up or down: add what is below the last kept bit, drawn evenly, and cut."""
        bits = 23 - {torch.float16: 10, torch.bfloat16: 7}[self._dtype]
        drawn = torch.randint(0, 1 << bits, value.shape, generator=self._drawn, dtype=torch.int32)
        cut = (value.contiguous().view(torch.int32) + drawn) & ~((1 << bits) - 1)
        found = cut.view(torch.float32)
        small = value.abs() < torch.finfo(self._dtype).smallest_normal
        return torch.where(small | ~torch.isfinite(value), value, found).to(self._dtype)

    def _blurred(self, value: Tensor) -> Tensor:
        """Move each sum by up to half a unit in its last place."""
        drawn = torch.rand(value.shape, generator=self._drawn) - 0.5
        return value * (1 + drawn * torch.finfo(torch.float32).eps)


def in_parts(name: str, parts: int, *args: Any, **kwargs: Any) -> Tensor:
    """Return a product as the sum of the products of its parts, added up in their order.

    Args:
        name: one of `PRODUCTS`.
        parts: so many, of about equal length along the dim that is summed over.
        args: of the operation.
        kwargs: of the operation; factors of ``addmm`` are refused.
    """
    assert not kwargs, kwargs
    bias: Tensor | None = None
    if name == "aten.addmm":
        bias, left, right = args
    elif name == "aten.linear":
        left, right, bias = args[0], args[1].mT, args[2] if len(args) > 2 else None
    else:
        left, right = args
    size = left.shape[-1]
    if right.ndim < 2 or left.ndim < 2 or size < parts:
        return torch.matmul(left, right) if bias is None else torch.matmul(left, right) + bias
    at = [size * part // parts for part in range(parts + 1)]
    found: Tensor = left[..., : at[1]] @ right[..., : at[1], :]
    for start, end in pairwise(at[1:]):
        found = found + left[..., start:end] @ right[..., start:end, :]
    return found if bias is None else found + bias


@contextmanager
def computing_as(model: Any, compute: Compute, way: Way) -> Iterator[None]:
    """Let a float32 model of transformers compute in a precision and a way; afterwards it is as it was."""
    mode = Arithmetic(compute, way)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    hooks = []

    def enter(*_: Any) -> None:
        mode.kept += 1

    def leave(*_: Any) -> None:
        mode.kept -= 1

    for module in model.modules():
        if type(module).__name__.endswith(KEPT):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        _set_attention(base, way.attention)
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()
        _set_attention(base, before)


def _set_attention(model: nn.Module, name: str) -> None:
    """Set the attention, where the architecture has it in this form; else it stays what it is."""
    setter: Callable[[str], None] = model.set_attn_implementation  # type: ignore[assignment]
    try:
        setter(name)
    except (ValueError, ImportError):  # what an architecture does not support
        return
