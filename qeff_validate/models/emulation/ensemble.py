# SPDX-License-Identifier: Apache-2.0
"""Runs the original model in another arithmetic: every operation in half precision, products summed in another order.

What such a run gives is as right as an artifact can be in that precision, and owes nothing to any artifact, exporter,
compiler or simulator: operations are torch's own, and only what goes into them is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qeff_validate.models.framework_calls import quiet_transformers
from qeff_validate.models.sources.exportable_experts import exportable_experts

T = TypeVar("T")

Compute = Literal["fp32", "fp16", "bf16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRODUCTS = frozenset({"addmm", "bmm", "linear", "matmul", "mm"})

LEARNED = "_qeff_validate_learned"
"""Marks tensors that weights took part in."""

ROUNDED = "_qeff_validate_rounded"
"""Marks views of weights, which are rounded already: rounding them again would take longest of all."""

KEPT = ("RMSNorm",)
"""Ends of names of classes that compute in float32 on a card too, because the compiler is asked for it."""

POOL = 1 << 22
"""Random numbers that are drawn once for a way; each rounding takes its own stretch of them."""


@dataclass(frozen=True, slots=True)
class ComputationVariant:
    """One of the ways in which the same model can legitimately be computed.

    Attributes:
        name: for provenance.
        attention: an attention implementation of transformers.
        parts: products are sums of so many partial products.
        seed: None rounds to nearest; else each rounding goes up or down at random, as far as it lies.
        batch: rows that run together, padded to the longest; None: rows of equal length, without padding.
        block: numbers that share a scale in a compressed format.
        fused: a root mean square is one operation; else its factor is stored in the precision, which moves whole rows.
    """

    name: str
    attention: str = "eager"
    parts: int = 1
    seed: int | None = None
    batch: int | None = None
    block: int = 32
    fused: bool = True


ENSEMBLE = (
    ComputationVariant("eager, rows of equal length"),
    ComputationVariant("sdpa, padded batches of 8", "sdpa", batch=8),
    ComputationVariant("eager, sums in 2 parts, padded batches of 16", parts=2, batch=16, fused=False),
    ComputationVariant("eager, sums in 4 parts, padded batches of 3", parts=4, batch=3, block=16, fused=False),
    ComputationVariant("sdpa, sums in 8 parts, padded batches of 12", "sdpa", parts=8, batch=12, block=64),
    ComputationVariant("eager, random rounding, padded batches of 5", seed=1, batch=5, fused=False),
    ComputationVariant("eager, random rounding, rows of equal length", seed=2),
    ComputationVariant(
        "sdpa, random rounding, sums in 2 parts, padded batches of 6", "sdpa", parts=2, seed=3, batch=6, fused=False
    ),
)
"""The ensemble: kernels, orders of sums, batches, padding, roundings, and layouts of compressed blocks.

Each way computes on one thread; in how many parts the threads of an operation sum is what ``parts`` varies.
"""


class Rounded:
    """The weights of a model as a compiler stores them in a precision: clipped, and rounded to nearest; made once.

    Those of a large model are kept in half the bytes, and widened each time they are read.
    """

    def __init__(self, compute: Compute, *, large: bool = False) -> None:
        self._dtype, self._large = DTYPES[compute], large
        self._tensors: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def read(self, weight: nn.Parameter) -> Tensor:
        """Return a float32 weight as it is after rounding, in float32."""
        if id(weight) not in self._tensors:
            stored = self._stored(weight)
            self._tensors[id(weight)] = weight, stored if self._large else stored.to(torch.float32)
        return self._tensors[id(weight)][1].to(torch.float32)

    def _stored(self, weight: nn.Parameter) -> Tensor:
        most = torch.finfo(self._dtype).max
        return weight.detach().to(self._dtype).clamp_(-most, most)


class RoundedInPlace(Rounded):
    """The same for a model that is of no other use: its own parameters are rounded, and no second copy is kept.

    Args:
        compute: the precision.
        model: its parameters are changed, but for those of modules that compute in float32 on a card too.
    """

    def __init__(self, compute: Compute, model: nn.Module) -> None:
        super().__init__(compute)
        exempt = {id(p) for m in model.modules() if type(m).__name__.endswith(KEPT) for p in m.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in exempt and parameter.dtype == torch.float32:
                parameter.data.copy_(self._stored(parameter))
        self._exempt = exempt

    def read(self, weight: nn.Parameter) -> Tensor:
        """Return the weight, which is rounded already."""
        return super().read(weight) if id(weight) in self._exempt else weight.detach()


class Arithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, operations read float32 numbers rounded to a precision, and sum products in parts.

    Args:
        compute: the precision; in fp32 only the way differs.
        variant: how.
        weights: rounded weights that runs share; None: this one's own.
    """

    def __init__(self, compute: Compute, variant: ComputationVariant, weights: Rounded | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._variant = DTYPES[compute], variant
        self._most = torch.finfo(self._dtype).max
        self._drawn = None if variant.seed is None else torch.Generator().manual_seed(variant.seed)
        if self._drawn is not None:  # never from torch's own generator, which is the caller's
            pool = torch.randint(0, 1 << 30, (POOL,), generator=self._drawn, dtype=torch.int32)
            # in float32 an error for each sum; else what is below the last kept bit, drawn evenly
            self._pool = _relative(pool) if self._dtype == torch.float32 else pool & ((1 << _DROPPED[self._dtype]) - 1)
        self._weights = weights or Rounded(compute)
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
        if name in PRODUCTS and self._variant.parts > 1:
            found = in_parts(name, self._variant.parts, *args, **given)
        else:
            found = func(*args, **given)
        if name in PRODUCTS and self._drawn is not None and self._dtype == torch.float32:
            found = self._blurred(found)
        if self.kept and name == "rsqrt" and not self._variant.fused and self._dtype != torch.float32:
            found = self._read(found)
        if own is not None and func._schema.is_mutable:  # it has written into what it read
            found = own[0].copy_(found)
        if own is not None and func.is_view:
            setattr(found, ROUNDED, True)
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
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or hasattr(value, ROUNDED):
            return value
        if isinstance(value, nn.Parameter):
            return self._weights.read(value)
        if not hasattr(value, LEARNED):
            value = value.clamp(-self._most, self._most)
        return (value.to(self._dtype) if self._drawn is None else self._either(value)).to(torch.float32)

    def _either(self, value: Tensor) -> Tensor:
        """Round up or down: add what is below the last kept bit, drawn evenly, and cut."""
        cut = (value.view(torch.int32) + self._numbers(value)).bitwise_and_(-(1 << _DROPPED[self._dtype]))
        # infinity keeps its bits; a NaN whose bits are all set would become a zero
        return torch.where(torch.isnan(value), value, cut.view(torch.float32)).to(self._dtype)

    def _blurred(self, value: Tensor) -> Tensor:
        """Move each sum by up to half a unit in its last place; a factor near 1 would only ever make it smaller."""
        return torch.addcmul(value, value, self._numbers(value))

    def _numbers(self, like: Tensor) -> Tensor:
        """Return numbers of the pool in the shape of a tensor, from a random place on: drawing anew takes longest."""
        count = like.numel()
        start = int(torch.randint(0, max(POOL - count, 1), (), generator=self._drawn))
        if count > POOL:
            return self._pool.roll(-start).repeat(-(-count // POOL))[:count].view(like.shape)
        return self._pool[start : start + count].view(like.shape)


_DROPPED: Mapping[torch.dtype, int] = {torch.float16: 13, torch.bfloat16: 16}
"""Bits of a float32 number that a precision does not keep."""


def _relative(drawn: Tensor) -> Tensor:
    """Turn numbers below 2³⁰ into relative errors of up to half a unit in the last place of float32, of either sign."""
    return (drawn / (1 << 30) - 0.5) * torch.finfo(torch.float32).eps


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
def computing_as(
    model: Any, compute: Compute, variant: ComputationVariant, weights: Rounded | None = None
) -> Iterator[None]:
    """Let a float32 model of transformers compute in a precision and a way; afterwards it is as it was.

    Attention and experts are chosen by `run_ensemble`, because two threads may not choose them at once.
    """
    mode = Arithmetic(compute, variant, weights)

    def enter(*_: Any) -> None:
        mode.kept += 1

    def leave(*_: Any) -> None:
        mode.kept -= 1

    with ExitStack() as held:
        for module in model.modules():
            if type(module).__name__.endswith(KEPT):
                held.callback(module.register_forward_pre_hook(enter).remove)
                held.callback(module.register_forward_hook(leave).remove)
        with torch.no_grad(), mode:
            yield


def run_ensemble(
    model: Any,
    compute: Compute,
    run: Callable[[Any, ComputationVariant], T],
    *,
    weights: Rounded,
    compressed: Mapping[int, AbstractContextManager[Any]] | None = None,
    variants: Sequence[ComputationVariant] = ENSEMBLE,
) -> list[T]:
    """Run a float32 model of transformers in every way, as many side by side as torch has threads.

    Many operations of a small model are too short to be shared by threads, which then wait for each other, and for
    whatever else the machine does; whole ways have nothing to wait for.

    Args:
        model: is left as it is; each way gets modules of its own with the same weights.
        compute: the precision.
        run: called with such a model and its way, while it computes in the precision.
        weights: rounded ones, for all ways.
        compressed: by block size, what makes products read compressed weights.
        variants: the ensemble.

    Returns:
        What ``run`` returned for each way, in their order.
    """
    threads = torch.get_num_threads()

    def run_variant(replica: Any, variant: ComputationVariant) -> T:
        torch.set_num_threads(1)
        with (compressed or {}).get(variant.block, nullcontext()), computing_as(replica, compute, variant, weights):
            return run(replica, variant)

    with ExitStack() as held:
        held.callback(torch.set_num_threads, threads)
        replicas = [sharing_copy(model) for _ in variants]
        for replica, variant in zip(replicas, variants, strict=True):
            held.enter_context(attending(replica, variant))
            held.enter_context(exportable_experts(replica))
        if threads == 1:
            return [run_variant(replica, variant) for replica, variant in zip(replicas, variants, strict=True)]
        torch.set_num_threads(1)
        with ThreadPoolExecutor(min(threads, len(variants))) as pool:
            return list(pool.map(run_variant, replicas, variants))


def sharing_copy(model: T) -> T:
    """Return a copy of a model that shares its parameters and buffers."""
    assert isinstance(model, nn.Module)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


@contextmanager
def attending(model: Any, variant: ComputationVariant) -> Iterator[None]:
    """Let a model use the attention of a way, where its architecture has it in this form."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        with quiet_transformers():
            model.set_attn_implementation(variant.attention)
    except (AttributeError, ValueError, ImportError):  # no model of transformers, or it does not support this one
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)
