# SPDX-License-Identifier: Apache-2.0
"""Runs the original model in another arithmetic: every operation in half precision, products summed in another order.

What such a run gives is as right as an artifact can be in that precision, and owes nothing to any artifact, exporter,
compiler or simulator: operations are torch's own, and only what goes into them is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qeff_validate.models.loading import quiet
from qeff_validate.models.reference import LARGE

Compute = Literal["fp32", "fp16", "bf16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRODUCTS = frozenset({"addmm", "bmm", "linear", "matmul", "mm"})

LEARNED = "_qeff_validate_learned"
"""Marks tensors that weights took part in."""

KEPT = ("RMSNorm",)
"""Ends of names of classes that compute in float32 on a card too, because the compiler is asked for it."""

POOL = 65521
"""Random numbers that are drawn once; a prime, so that rows of a tensor do not get the same ones."""


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways in which the same model can legitimately be computed.

    Attributes:
        name: for provenance.
        attention: an attention implementation of transformers.
        parts: products are sums of so many partial products.
        seed: None rounds to nearest; else each rounding goes up or down at random, as far as it lies.
        batch: rows that run together, padded to the longest, last row first.
    threads: of one operation; None: torch's own choice.
    block: numbers that share a scale in a compressed format.
    fused: a root mean square is one operation; else its factor is stored in the precision, which moves whole rows.
    """

    name: str
    attention: str = "eager"
    parts: int = 1
    seed: int | None = None
    batch: int = 8
    threads: int | None = None
    block: int = 32
    fused: bool = True


WAYS = (
    Way("eager, each row by itself", batch=1),
    Way("sdpa, batches of 8", "sdpa"),
    Way("eager, sums in 2 parts, batches of 16, one thread", parts=2, batch=16, threads=1, fused=False),
    Way("eager, sums in 4 parts, batches of 3", parts=4, batch=3, block=16, fused=False),
    Way("sdpa, sums in 8 parts, batches of 8", "sdpa", parts=8, block=64),
    Way("eager, random rounding, batches of 16", seed=1, batch=16, fused=False),
    Way("eager, random rounding, batches of 8", seed=2),
    Way("sdpa, random rounding, sums in 2 parts, batches of 5", "sdpa", parts=2, seed=3, batch=5, fused=False),
)
"""The ensemble: kernels, orders of sums, batches, padding, threads, roundings, and layouts of compressed blocks."""


class Arithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, operations read float32 numbers rounded to a precision, and sum products in parts.

    Args:
        compute: the precision; in fp32 only the way differs.
        way: how.
        keep: rounded weights are kept beside the weights; else they are rounded each time they are read.
    """

    def __init__(self, compute: Compute, way: Way, *, keep: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._way = DTYPES[compute], way
        self._most = torch.finfo(self._dtype).max
        self._drawn = None if way.seed is None else torch.Generator().manual_seed(way.seed)
        if self._drawn is not None:  # never from torch's own generator, which is the caller's
            self._pool = torch.randint(0, 1 << 30, (POOL,), generator=self._drawn, dtype=torch.int32)
        self._weights: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.kept = 0
        """How many modules that compute in float32 are being run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        given, name, own = kwargs or {}, func.overloadpacket.__name__, None
        tensors = [value for value in _flat((*args, *given.values())) if isinstance(value, Tensor)]
        # what positions alone decide (rotary angles, buckets of distances) is folded, or computed in float32
        learned = any(isinstance(value, nn.Parameter) or hasattr(value, LEARNED) for value in tensors)
        # a view of what is computed is read later, and what is written into it must reach the whole
        shows = func.is_view and not isinstance(args[0], nn.Parameter)
        if learned and not shows and not self.kept and self._dtype != torch.float32:
            own, args = args, self._read(args)
            given = {key: self._read(value) for key, value in given.items()}
        if name in PRODUCTS and self._way.parts > 1:
            found = in_parts(name, self._way.parts, *args, **given)
        else:
            found = func(*args, **given)
        if name in PRODUCTS and self._drawn is not None and self._dtype == torch.float32:
            found = self._blurred(found)
        if self.kept and name == "rsqrt" and not self._way.fused and self._dtype != torch.float32:
            found = self._read(found)
        if own is not None and func._schema.is_mutable:  # it has written into what it read
            found = own[0].copy_(found)
        if learned:
            for value in _flat((found,)):
                if isinstance(value, Tensor):
                    setattr(value, LEARNED, True)
        return found

    def _read(self, value: Any) -> Any:
        """Return what an operation sees of its arguments."""
        if isinstance(value, tuple):
            return tuple(self._read(item) for item in value)
        if isinstance(value, list):
            return [self._read(item) for item in value]
        if isinstance(value, float):  # a compiler clips constants, such as what masks put in
            return min(max(value, -self._most), self._most)
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if isinstance(value, nn.Parameter):
            return self._stored(value)
        if not hasattr(value, LEARNED):
            value = value.clamp(-self._most, self._most)
        return (value.to(self._dtype) if self._drawn is None else self._either(value)).to(torch.float32)

    def _stored(self, weight: nn.Parameter) -> Tensor:
        """Return a weight as a compiler stores it: clipped, and rounded to nearest."""
        if self._weights is None:
            return weight.detach().to(self._dtype).to(torch.float32).clamp_(-self._most, self._most)
        if id(weight) not in self._weights:
            rounded = weight.detach().clamp(-self._most, self._most).to(self._dtype).to(torch.float32)
            self._weights[id(weight)] = weight, rounded
        return self._weights[id(weight)][1]

    def _either(self, value: Tensor) -> Tensor:
        """Round up or down: add what is below the last kept bit, drawn evenly, and cut."""
        bits = 23 - {torch.float16: 10, torch.bfloat16: 7}[self._dtype]
        drawn = self._numbers(value.numel()).view(value.shape) & ((1 << bits) - 1)
        cut = (value.contiguous().view(torch.int32) + drawn) & ~((1 << bits) - 1)
        small = value.abs() < torch.finfo(self._dtype).smallest_normal
        return torch.where(small | ~torch.isfinite(value), value, cut.view(torch.float32)).to(self._dtype)

    def _blurred(self, value: Tensor) -> Tensor:
        """Move each sum by up to half a unit in its last place."""
        drawn = self._numbers(value.numel()).view(value.shape) / (1 << 30) - 0.5
        return value * (1 + drawn * torch.finfo(torch.float32).eps)

    def _numbers(self, count: int) -> Tensor:
        """Return numbers below 2³⁰, from a random place in the pool on: drawing them anew would take longest."""
        start = int(torch.randint(0, POOL, (), generator=self._drawn))
        return self._pool.roll(-start).repeat(-(-count // POOL))[:count]


def _flat(values: Any) -> Iterator[Any]:
    """Yield arguments, and the members of lists among them."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


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
    if name == "addmm":
        bias, left, right = args
    elif name == "linear":
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
    small = sum(parameter.nbytes for parameter in model.parameters()) <= LARGE
    mode, threads = Arithmetic(compute, way, keep=small), torch.get_num_threads()

    def enter(*_: Any) -> None:
        mode.kept += 1

    def leave(*_: Any) -> None:
        mode.kept -= 1

    with ExitStack() as held:
        for module in model.modules():
            if type(module).__name__.endswith(KEPT):
                held.callback(module.register_forward_pre_hook(enter).remove)
                held.callback(module.register_forward_hook(leave).remove)
        held.enter_context(attending(model.get_base_model() if hasattr(model, "get_base_model") else model, way))
        held.callback(torch.set_num_threads, threads)
        torch.set_num_threads(way.threads or threads)
        with torch.no_grad(), mode:
            yield


@contextmanager
def attending(model: Any, way: Way) -> Iterator[None]:
    """Let a model use an attention, where its architecture has it in this form."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        with quiet():
            model.set_attn_implementation(way.attention)
    except (AttributeError, ValueError, ImportError):  # no model of transformers, or it does not support this one
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)
