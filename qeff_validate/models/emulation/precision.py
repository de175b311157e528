# SPDX-License-Identifier: Apache-2.0
"""Emulates a compute precision in float32: the inputs of every operation are rounded, products are summed in parts.

Operations are torch's own; only their inputs, and the summation order of products, are changed.
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

from qeff_validate.models.scratch import filled

Compute = Literal["fp32", "fp16", "bf16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRODUCTS = frozenset({"addmm", "bmm", "linear", "matmul", "mm"})
"""Names of the matrix products of torch."""

DEPENDS_ON_WEIGHTS = "_qeff_validate_depends_on_weights"
"""Attribute that marks tensors computed from weights."""

ALREADY_ROUNDED = "_qeff_validate_rounded"
"""Attribute that marks views of rounded weights: rounding them again would dominate the run time."""

VIEW_OF = "_qeff_validate_view_of"
"""Attribute of the views of a parameter: its id."""

FLOAT32_MODULES = ("RMSNorm",)
"""Suffixes of class names of modules that compute in float32 on a card too, because the compiler is asked for it."""

RANDOM_POOL_SIZE = 1 << 22
"""Random numbers that are drawn once per variant; each rounding takes a slice of them."""


@dataclass(frozen=True, slots=True)
class ComputationVariant:
    """One legitimate way to compute a model in a precision.

    Attributes:
        name: for provenance.
        attention: an attention implementation of transformers.
        parts: number of partial products that a matrix product is the sum of.
        seed: None: round to nearest; else stochastic rounding with this seed.
        batch: rows per batch, padded to the longest; None: batches of rows of equal length, without padding.
        block: elements that share a scale in a compressed format.
        fused: RMSNorm is one operation; else its factor is rounded to the precision, which scales whole rows.
    """

    name: str
    attention: str = "eager"
    parts: int = 1
    seed: int | None = None
    batch: int | None = None
    block: int = 32
    fused: bool = True


class RoundedWeights:
    """The weights of a model as a compiler stores them in a precision: clipped, rounded to nearest, and cached.

    Args:
        compute: the precision.
        large: keep the weights in files that are mapped, to save memory (`scratch`).
        beyond_range: an operation that reads a number beyond the precision's range, or that has done so in an earlier
            run, reads nothing rounded, as if a list of nodes kept it in float32.
    """

    def __init__(self, compute: Compute, *, large: bool = False, beyond_range: bool = False) -> None:
        self._dtype, self._large, self.beyond_range = DTYPES[compute], large, beyond_range
        self.unrounded: set[int] = set()
        """Ids of the parameters that an operation has read beside a number beyond the range."""
        self._tensors: dict[int, tuple[nn.Parameter, int, Tensor]] = {}

    def read(self, weight: nn.Parameter) -> Tensor:
        """Return a float32 weight rounded to the precision, float32."""
        version = 0 if weight.is_inference() else weight._version  # an adapter may write into a weight of the base
        if id(weight) not in self._tensors or self._tensors[id(weight)][1] != version:
            self._tensors[id(weight)] = weight, version, self._rounded(weight)
        return self._tensors[id(weight)][2]

    def _rounded(self, weight: nn.Parameter) -> Tensor:
        if self._large:
            return filled(weight.detach(), torch.float32, self._round)
        return self._round(weight.detach()).to(torch.float32)

    def _round(self, values: Tensor) -> Tensor:
        maximum = torch.finfo(self._dtype).max
        return values.to(self._dtype).clamp_(-maximum, maximum)


class InPlaceRoundedWeights(RoundedWeights):
    """Rounds the parameters of a model in place, so that no second copy is kept.

    Args:
        compute: the precision.
        model: its parameters are changed, except those of `FLOAT32_MODULES`.
        large: give them content in files that are mapped, because writing into a mapped checkpoint copies it to memory.
    """

    def __init__(self, compute: Compute, model: nn.Module, *, large: bool = False) -> None:
        super().__init__(compute, large=large)
        exempt = {id(p) for m in model.modules() if type(m).__name__.endswith(FLOAT32_MODULES) for p in m.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in exempt and parameter.dtype == torch.float32:
                if large:
                    parameter.data = self._rounded(parameter)
                else:
                    parameter.data.copy_(self._round(parameter.detach()))
        self._exempt = exempt

    def read(self, weight: nn.Parameter) -> Tensor:
        """Return the weight, rounded to the precision."""
        return super().read(weight) if id(weight) in self._exempt else weight.detach()


def _parameters(tensors: list[Tensor]) -> set[int]:
    """Return the ids of the parameters among some tensors, and of those that they are views of."""
    ids = {id(value) for value in tensors if isinstance(value, nn.Parameter)}
    return ids | {getattr(value, VIEW_OF) for value in tensors if hasattr(value, VIEW_OF)}


def fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Return True unless a finite element is beyond the range of a dtype."""
    maximum = torch.finfo(dtype).max
    return not bool(((value.abs() > maximum) & torch.isfinite(value)).any())


class PrecisionMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode in which operations read float32 inputs rounded to a precision, and products are summed in parts.

    Args:
        compute: the precision; fp32 rounds no input, so only the variant has an effect.
        variant: rounding, parts of sums, and whether RMSNorm is fused.
        weights: rounded weights that runs share; None: a cache of its own.
    """

    def __init__(self, compute: Compute, variant: ComputationVariant, weights: RoundedWeights | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._variant = DTYPES[compute], variant
        self._maximum = torch.finfo(self._dtype).max
        self._generator = None if variant.seed is None else torch.Generator().manual_seed(variant.seed)
        if self._generator is not None:  # never from torch's own generator, which is the caller's
            pool = torch.randint(0, 1 << 30, (RANDOM_POOL_SIZE,), generator=self._generator, dtype=torch.int32)
            # float32: a relative error for each sum; else a uniform number below the last bit that is kept
            mask = (1 << DROPPED_BITS.get(self._dtype, 0)) - 1
            self._pool = _as_relative_errors(pool) if self._dtype == torch.float32 else pool & mask
        self._weights = weights or RoundedWeights(compute)
        self.float32_depth = 0
        """Number of `FLOAT32_MODULES` that are being run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs, name, original_args = kwargs or {}, func.overloadpacket.__name__, None
        tensors = [value for value in _flatten((*args, *kwargs.values())) if isinstance(value, Tensor)]
        # what depends on positions alone (rotary angles, relative distances) is constant-folded, or computed in float32
        weighted = any(isinstance(value, nn.Parameter) or hasattr(value, DEPENDS_ON_WEIGHTS) for value in tensors)
        # a view of an activation is rounded when it is read, and what is written into it must reach its base
        activation_view = func.is_view and not isinstance(args[0], nn.Parameter)
        parameters = _parameters(tensors) if self._weights.beyond_range else set()
        if weighted and not activation_view and self._rounds(tensors, parameters):
            original_args, args = args, self._read(args)
            kwargs = {key: self._read(value) for key, value in kwargs.items()}
        if name in PRODUCTS and self._variant.parts > 1:
            result = in_parts(name, self._variant.parts, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if name in PRODUCTS and self._generator is not None and self._dtype == torch.float32:
            result = self._perturb(result)
        if self.float32_depth and name == "rsqrt" and not self._variant.fused and self._dtype != torch.float32:
            result = self._read(result)
        if original_args is not None and func._schema.is_mutable:  # it has written into the rounded copy
            result = original_args[0].copy_(result)
        if original_args is not None and func.is_view:
            setattr(result, ALREADY_ROUNDED, True)
        if func.is_view and parameters:
            setattr(result, VIEW_OF, next(iter(parameters)))
        if weighted:
            for value in _flatten((result,)):
                if isinstance(value, Tensor):
                    setattr(value, DEPENDS_ON_WEIGHTS, True)
        return result

    def _rounds(self, tensors: list[Tensor], parameters: set[int]) -> bool:
        """Return whether an operation reads rounded values.

        Args:
            tensors: its arguments.
            parameters: ids of those that are parameters or views of such.
        """
        if self.float32_depth or self._dtype == torch.float32:
            return False
        if not self._weights.beyond_range:
            return True
        floats = [value for value in tensors if value.dtype == torch.float32]
        if all(fits(value, self._dtype) for value in floats) and not parameters & self._weights.unrounded:
            return True
        self._weights.unrounded |= parameters
        return False

    def _read(self, value: Any) -> Any:
        """Return an argument as an operation reads it: rounded to the precision."""
        if isinstance(value, tuple):
            return tuple(self._read(item) for item in value)
        if isinstance(value, list):
            return [self._read(item) for item in value]
        if isinstance(value, float):  # a compiler clips constants, such as the values of masks
            return min(max(value, -self._maximum), self._maximum)
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or hasattr(value, ALREADY_ROUNDED):
            return value
        if isinstance(value, nn.Parameter):
            return self._weights.read(value)
        if not hasattr(value, DEPENDS_ON_WEIGHTS):
            value = value.clamp(-self._maximum, self._maximum)
        return (value.to(self._dtype) if self._generator is None else self._round_randomly(value)).to(torch.float32)

    def _round_randomly(self, value: Tensor) -> Tensor:
        """Round stochastically: add a uniform number below the last bit that is kept, and truncate."""
        truncated = (value.view(torch.int32) + self._random_like(value)).bitwise_and_(-(1 << DROPPED_BITS[self._dtype]))
        # infinity keeps its bits; a NaN whose bits are all set would become a zero
        return torch.where(torch.isnan(value), value, truncated.view(torch.float32)).to(self._dtype)

    def _perturb(self, value: Tensor) -> Tensor:
        """Add an error of up to half a unit in the last place; a product with a factor near 1 would only shrink it."""
        return torch.addcmul(value, value, self._random_like(value))

    def _random_like(self, like: Tensor) -> Tensor:
        """Return a slice of the random pool in the shape of a tensor: drawing new numbers would dominate the run."""
        count = like.numel()
        start = int(torch.randint(0, max(RANDOM_POOL_SIZE - count, 1), (), generator=self._generator))
        if count > RANDOM_POOL_SIZE:
            return self._pool.roll(-start).repeat(-(-count // RANDOM_POOL_SIZE))[:count].view(like.shape)
        return self._pool[start : start + count].view(like.shape)


DROPPED_BITS: Mapping[torch.dtype, int] = {torch.float16: 13, torch.bfloat16: 16}
"""Mantissa bits of float32 that a precision drops."""


def _as_relative_errors(integers: Tensor) -> Tensor:
    """Map integers below 2³⁰ to relative errors of up to half a unit in the last place of float32, of either sign."""
    return (integers / (1 << 30) - 0.5) * torch.finfo(torch.float32).eps


def _flatten(values: Any) -> Iterator[Any]:
    """Yield the arguments, with lists and tuples flattened."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flatten(value)
        else:
            yield value


def in_parts(name: str, parts: int, *args: Any, **kwargs: Any) -> Tensor:
    """Return a matrix product as the sum of partial products, added in order.

    Args:
        name: one of `PRODUCTS`.
        parts: number of parts, of about equal length along the reduced dim.
        args: of the operation.
        kwargs: of the operation; ``alpha`` and ``beta`` of ``addmm`` are refused.
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
    limits = [size * part // parts for part in range(parts + 1)]
    product: Tensor = left[..., : limits[1]] @ right[..., : limits[1], :]
    for start, end in pairwise(limits[1:]):
        product = product + left[..., start:end] @ right[..., start:end, :]
    return product if bias is None else product + bias


@contextmanager
def emulate_precision(
    model: Any, compute: Compute, variant: ComputationVariant, weights: RoundedWeights | None = None
) -> Iterator[None]:
    """Emulate a precision in a float32 transformers model until the context ends.

    `run_ensemble` sets the implementations of attention and experts, because two threads may not do so at once.
    """
    mode = PrecisionMode(compute, variant, weights)

    def enter(*_: Any) -> None:
        mode.float32_depth += 1

    def leave(*_: Any) -> None:
        mode.float32_depth -= 1

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith(FLOAT32_MODULES):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with torch.no_grad(), mode:
            yield
