# SPDX-License-Identifier: Apache-2.0
"""What an attention may compute in place of its own: other scales, masks, layouts of heads and rotary positions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qeff_validate.explain.least_error import least
from qeff_validate.explain.rotary import rotary_hypotheses
from qeff_validate.explain.tried_module import TriedModule, changed
from qeff_validate.explain.vectors import factor_text

SCALES = ("scaling", "softmax_scale", "scale", "scale_attn", "norm_factor")

SCALE_FACTORS = (-1, 0, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1, 1.01, 1.05, 1.1, 1.25, 1.5, 2, 4, 8, 16)
"""Factors of the scores that are tried first."""

QUERIES = ("q", "query", "q_proj", "q_lin")
"""Names of the layer whose outputs the scores are proportional to."""

LEAST_MASK = -1e3
"""Value from which a number among an attention's arguments hides a place."""

MASK_VALUES = (-100.0, 1.0, 1e4)
"""What masks have been seen to add that were written for another precision, or with the wrong sign."""

WEAK_MASKS = (-40, -20, -15, -12, -10, -8, -6, -5, -4, -3, -2, -1, -0.5, -0.1)
"""Numbers that are tried first for a mask that hides too little."""


def attention_hypotheses(
    tried: TriedModule, observed: Any, size: Callable[[Any, Any], float]
) -> Iterator[tuple[str, Any]]:
    """Yield what an attention gives with one change each, with a name of the change; of other modules nothing.

    Args:
        tried: the module.
        observed: what the graph gives.
        size: of an error, from the expected and the actual value.
    """
    scaled = _score_scaling(tried.module)
    if scaled is not None:
        yield from _scale(tried, scaled, observed, size)
        yield from _other_masks(tried, observed, size)
        yield from _other_heads(tried)
        yield from rotary_hypotheses(tried, observed, size)
        yield from _other_softmax(tried)


def _other_masks(tried: TriedModule, observed: Any, size: Callable[[Any, Any], float]) -> Iterator[tuple[str, Any]]:
    """Yield the module with other additive masks, [batch, heads or 1, queries, keys]."""
    args, kwargs = tried.call
    cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "slots")), None)

    def run(change: Callable[[Tensor], Tensor]) -> Any:
        def of(value: Any) -> Any:
            is_mask = isinstance(value, Tensor) and value.is_floating_point() and bool((value <= LEAST_MASK).any())
            if not is_mask:
                return value
            return change(value) if cache is None else _over_slots(change, value, cache.tokens, cache.slots)

        call = tuple(map(of, args)), {name: of(value) for name, value in kwargs.items()}
        return tried.run(call)

    yield "the mask is left out", run(torch.zeros_like)
    weak = least(lambda value: size(run(functools.partial(_with_hidden, value)), observed), WEAK_MASKS)
    for value in (weak, *MASK_VALUES):
        text = f"the mask adds {value:.3g} to hidden places, which does not hide them"
        yield text, run(functools.partial(_with_hidden, value))
    yield "the mask is not causal", run(lambda mask: mask[..., -1:, :].expand_as(mask))
    yield "the mask is causal", run(lambda mask: mask + torch.full_like(mask, -1e30).triu(1))
    yield "the mask hides no padding", run(lambda mask: torch.full_like(mask, -1e30).triu(1))
    for step in (1, -1):
        yield f"the mask is shifted by {step:+d}", run(functools.partial(torch.roll, shifts=step, dims=-1))


def _over_slots(change: Callable[[Tensor], Tensor], mask: Tensor, tokens: int, slots: int) -> Tensor:
    """Return a mask over the tokens of a text that does what a changed mask over the slots of a cache does.

    A graph reads the last token in each slot that is not written; so often it counts if the mask does not hide them.

    Args:
        change: of the mask, float64 ``[…, queries, slots]``.
        mask: ``[…, queries, keys]``, the tokens first.
        tokens: of the text.
        slots: of the cache.
    """
    whole = functional.pad(mask[..., :tokens], (0, slots - tokens), value=torch.finfo(mask.dtype).min)
    changed_mask = change(whole)
    last = changed_mask[..., tokens - 1 :].logsumexp(dim=-1, keepdim=True)
    return torch.cat([changed_mask[..., : tokens - 1], last, mask[..., tokens:]], dim=-1)


def _with_hidden(value: float, mask: Tensor) -> Tensor:
    """Return a mask that adds another value to what it hides."""
    return torch.where(mask <= LEAST_MASK, value, mask)


def _other_heads(tried: TriedModule) -> Iterator[tuple[str, Any]]:
    """Yield attention with another layout of heads."""
    family = sys.modules[type(tried.module).__module__]
    if hasattr(family, "repeat_kv"):
        with changed(family, "repeat_kv", lambda states, count: states.repeat(1, count, 1, 1)):
            yield "heads of keys and values are repeated one after the other, not each in place", tried.run()


class SoftmaxOver(TorchFunctionMode):
    """Computes each softmax over another axis, or leaves it out.

    Args:
        axis: the axis; None: its input is its output.
    """

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self._axis = axis

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (functional.softmax, torch.softmax, Tensor.softmax):
            return func(*args, **kwargs)
        return args[0] if self._axis is None else torch.softmax(args[0], self._axis)


def _other_softmax(tried: TriedModule) -> Iterator[tuple[str, Any]]:
    """Yield the module with a softmax over the queries, and without one."""
    with SoftmaxOver(-2):
        yield "its softmax runs over axis -2, not the last", tried.run()
    with SoftmaxOver(None):
        yield "its softmax is left out", tried.run()


def _score_scaling(module: Any) -> Callable[[float], AbstractContextManager[None]] | None:
    """Return what multiplies the scores of an attention by a factor until its context ends; None of other modules."""
    name = next((name for name in SCALES if isinstance(getattr(module, name, None), float)), None)
    if name is not None:
        before = getattr(module, name)
        return lambda factor: changed(module, name, before * factor)
    if "Attention" not in type(module).__name__:
        return None
    family = sys.modules[type(module).__module__]
    attention = getattr(family, "eager_attention_forward", None)
    if attention is not None:

        def with_factor(*args: Any, factor: float, scaling: float | None = None, **more: Any) -> Any:
            query = args[1] * factor  # where no scale is given, the function has one of its own
            return attention(args[0], query, *args[2:], **({} if scaling is None else {"scaling": scaling}), **more)

        return lambda factor: changed(family, "eager_attention_forward", functools.partial(with_factor, factor=factor))
    query = next((child for name, child in module.named_children() if name in QUERIES), None)
    return None if query is None else functools.partial(_scaled_output, query)


@contextmanager
def _scaled_output(module: Any, factor: float) -> Iterator[None]:
    """Multiply what a module returns by a factor until the context ends."""
    handle = module.register_forward_hook(lambda _module, _args, output: output * factor)
    try:
        yield
    finally:
        handle.remove()


def _scale(
    tried: TriedModule,
    scaled: Callable[[float], AbstractContextManager[None]],
    observed: Any,
    size: Callable[[Any, Any], float],
) -> Iterator[tuple[str, Any]]:
    """Yield attention with the scale of its scores that fits best, by a search for the least error."""

    def error(factor: float) -> float:
        with scaled(factor):
            output = tried.run()
        return size(output, observed) if output.shape == observed.shape else float("inf")

    factor = least(error, SCALE_FACTORS)
    word = factor_text(factor)
    with scaled(factor):
        yield f"scores {'' if word.startswith('scaled') else 'are '}{word}", tried.run()
