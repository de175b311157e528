# SPDX-License-Identifier: Apache-2.0
"""Mutants of the transformers model itself, for embeddings and for language models: what a port gets wrong in a graph.

Each change takes any body or causal LM, adapted or not, in float32 or float64, and goes through `Patch` alone, so that
the model is afterwards what it was, bit by bit. Where only one layer is changed it is the last one, if nothing else
is said: what it does wrong is not amplified by others, so a bound that finds it there finds it anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from qeff_validate.models.emulation.microscaling import E2M3, in_blocks
from qeff_validate.mutation import module_finder as finder
from qeff_validate.mutation.mutant import Inapplicable, ModuleMutant, Patch

Change = Callable[[Any, Patch], None]

GRID = torch.linspace(-4, 4, 33)
"""Where functions are told apart."""

GARBAGE = slice(7, None, 32)
"""Rows of the word embeddings: some words of any text, and no special token of the usual vocabularies."""


def _restack(order: Callable[[list[Any]], list[Any]]) -> Change:
    def change(model: Any, patch: Patch) -> None:
        path, layers = finder.stack(model, least=2)
        parent, _, name = path.rpartition(".")
        patch.attribute(model.get_submodule(parent), name, nn.ModuleList(order(list(layers))))

    return change


def _layer_output(index: int, made: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Return a change of what a layer gives, by its input and its output."""

    def hook(layer: Any, args: Any, kwargs: Any, out: Any) -> Any:  # noqa: ARG001
        before = args[0] if args else kwargs["hidden_states"]
        return (made(before, out[0]), *out[1:]) if isinstance(out, tuple) else made(before, out)

    return lambda model, patch: patch.hook(finder.stack(model)[1][index].register_forward_hook(hook, with_kwargs=True))


def _clipped(before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    limit = 2 * after.square().mean(-1, keepdim=True).sqrt()
    return after.clamp(-limit, limit)


def _attention_scale(factor: float) -> Change:
    def change(model: Any, patch: Patch) -> None:
        found = finder.scales(model)
        for module, name in found:
            patch.attribute(module, name, getattr(module, name) * factor)
        queries = [] if found else finder.queries(model)
        if not found and not queries:
            raise Inapplicable("attention has neither a scale nor a query projection of its own")
        for linear, width in queries:
            finder.rewrite(patch, linear, partial(_times, first=width, factor=factor))
            if linear.bias is not None:
                patch.tensor(linear.bias, _times(linear.bias.detach().clone(), width, factor))

    return change


def _times(values: Tensor, first: int, factor: float) -> Tensor:
    values[:first] *= factor
    return values


def _swap_heads(model: Any, patch: Patch) -> None:
    heads = getattr(model.config, "num_attention_heads", 1)
    if heads < 2:
        raise Inapplicable("attention has one head")

    def swapped(weight: Tensor) -> Tensor:
        first, second, *others = weight.chunk(heads, dim=1)
        return torch.cat([second, first, *others], dim=1)

    finder.rewrite(patch, finder.attention_output(model), swapped)


def _swap_projections(model: Any, patch: Patch) -> None:
    found = finder.projections(model)
    for one, other in (("query", "key"), ("key", "value")):
        if {one, other} <= found.keys() and found[one].weight.shape == found[other].weight.shape:
            for name in ("weight", "bias"):
                left, right = getattr(found[one], name), getattr(found[other], name)
                if left is not None and right is not None:
                    kept = left.detach().clone()
                    patch.tensor(left, right.detach())
                    patch.tensor(right, kept)
            return
    raise Inapplicable("the last layer has no two projections of one shape among query, key and value")


def _transpose(model: Any, patch: Patch) -> None:
    linear = [module for path, module in finder.in_layer(model, -1, finder.is_linear) if finder.in_attention(path)]
    square = [module for module in linear if module.weight.shape[0] == module.weight.shape[1]]
    if not square:
        raise Inapplicable("no weight in the attention of the last layer is square")
    finder.rewrite(patch, square[-1], lambda weight: weight.T)


def _epsilon(model: Any, patch: Patch) -> None:
    for norm in finder.norms(model):
        name = finder.epsilon_of(norm) or ""
        patch.attribute(norm, name, max(10 * getattr(norm, name), 1e-5))


def _plain_norm(model: Any, patch: Patch) -> None:
    found = finder.in_layer(model, -1, finder.is_norm)
    if not found:
        raise Inapplicable("the last layer has no norm with a weight")
    norm, weight = found[-1][1], found[-1][1].weight
    patch.tensor(weight, torch.zeros_like(weight))
    bias = 0 if getattr(norm, "bias", None) is None else norm.bias
    some = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device).view_as(weight)
    adds_one = bool((norm(some) - bias).any())  # some families multiply by 1 + weight
    patch.tensor(weight, torch.full_like(weight, 0.0 if adds_one else 1.0))


def _final_norm_column(model: Any, patch: Patch) -> None:
    weight = finder.norms(model)[-1].weight
    value = weight.detach().clone()
    value.view(-1)[0] += 1e-2
    patch.tensor(weight, value)


def _other_gelu(model: Any, patch: Patch) -> None:
    exact, fast = gelu(GRID), gelu(GRID, approximate="tanh")
    found = 0
    for _, module in finder.called(model, finder.is_activation):
        value = module(GRID)
        for ours, formula in ((exact, "tanh"), (fast, "none")):
            if torch.allclose(value, ours, rtol=0, atol=1e-6):
                found += 1
                patch.hook(module.register_forward_hook(_replaced(partial(gelu, approximate=formula))))
    if not found:
        raise Inapplicable("the model has no GELU")


def _relu(model: Any, patch: Patch) -> None:
    found = finder.in_layer(model, -1, finder.is_activation)
    if not found or torch.equal(found[-1][1](GRID), torch.relu(GRID)):
        raise Inapplicable("the last layer has no activation that is not ReLU already")
    patch.hook(found[-1][1].register_forward_hook(_replaced(torch.relu)))


def _replaced(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda module, args, out: function(args[0])  # noqa: ARG005


def _in(part: Callable[[Any], Any], made: Callable[[Tensor], Tensor]) -> Change:
    """Return a change of the weight of a part, as ``[out, in]``."""
    return lambda model, patch: finder.rewrite(patch, part(model), made)


def _no_bias(model: Any, patch: Patch) -> None:
    # from the end, because an attention does not feel the bias of its keys
    for _, module in reversed(finder.in_layer(model, -1, finder.is_linear)):
        if module.bias is not None:
            patch.tensor(module.bias, torch.zeros_like(module.bias))
            return
    raise Inapplicable("the linear layers of the last layer have no bias")


def _garbage_words(model: Any, patch: Patch) -> None:
    table = model.get_input_embeddings().weight
    value = table.detach().clone()
    noise = torch.randn(value[GARBAGE].shape, generator=torch.Generator().manual_seed(0))
    value[GARBAGE] = noise.to(value) * value.std()
    patch.tensor(table, value)


def _round_weights(dtype: torch.dtype) -> Change:
    def change(model: Any, patch: Patch) -> None:
        for module in finder.own(model).values():
            for weight in module.parameters(recurse=False):
                patch.tensor(weight, weight.detach().to(dtype))

    return change


def _compress_weights(model: Any, patch: Patch) -> None:
    words = model.get_input_embeddings().weight
    for path, module in finder.own(model).items():
        if finder.is_linear(path, module) and module.weight is not words:
            finder.rewrite(patch, module, lambda weight: in_blocks(weight.float(), E2M3, 1))
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:  # experts
                patch.tensor(weight, in_blocks(weight.detach().float(), E2M3, -1))


def _scale_first_layer(model: Any, patch: Patch) -> None:
    for module in finder.own(finder.stack(model)[1][0]).values():
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:
                patch.tensor(weight, weight.detach() * 1.02)


def _later(model: Any, patch: Patch) -> None:
    modules = finder.own(model)
    tables = [
        made
        for path, made in modules.items()
        if isinstance(made, nn.Embedding) and re.search("pos|wpe|rel", path.rpartition(".")[2])
    ]
    for table in tables:
        patch.tensor(table.weight, torch.roll(table.weight.detach(), -1, 0))
    rotary = [] if tables else [made for made in modules.values() if "Rotary" in type(made).__name__]

    def one(value: Any) -> Any:
        return value + 1 if isinstance(value, Tensor) and not value.is_floating_point() else value

    def shift(module: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
        return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}

    for made in rotary:
        patch.hook(made.register_forward_pre_hook(shift, with_kwargs=True))
    if not tables and not rotary:
        raise Inapplicable("the model has no table of positions and no rotary embedding")


def _rotary_base(model: Any, patch: Patch) -> None:
    found = [(name, buffer) for name, buffer in model.named_buffers() if "inv_freq" in name.rpartition(".")[2]]
    if not found:
        raise Inapplicable("the model has no rotary frequencies")
    for _, buffer in found:
        share = torch.arange(len(buffer), dtype=buffer.dtype, device=buffer.device) / len(buffer)
        patch.tensor(buffer, buffer * 2.0**-share)


def _wider_window(model: Any, patch: Patch) -> None:
    window = getattr(model.config, "sliding_window", None)
    if not isinstance(window, int):
        raise Inapplicable("the model has no sliding window")
    patch.attribute(model.config, "sliding_window", window + 1)


def _filled(place: tuple[Any, ...], value: float) -> Change:
    def made(weight: Tensor) -> Tensor:
        weight[place] = value
        return weight

    return _in(finder.outer, made)


def _negated_row(weight: Tensor) -> Tensor:
    return torch.cat([-weight[:1], weight[1:]])


_LIST, _SIZES = "validation-methods §12.6", "upstream §6"
_FAULTS, _EXPORT = "tests/meta/test_faults.py", "upstream §7"
_SKIP_FIRST = _layer_output(0, lambda before, _: before)
_NO_ATTENTION = _in(finder.attention_output, torch.zeros_like)

MODULE_MUTANTS: tuple[ModuleMutant, ...] = (
    ModuleMutant("last layer dropped", "layers", _restack(lambda found: found[:-1]), _SIZES, gross=True, ceiling=True),
    ModuleMutant("first two layers swapped", "layers", _restack(lambda f: [f[1], f[0], *f[2:]]), _FAULTS, gross=True),
    ModuleMutant("first layer skipped", "layers", _SKIP_FIRST, _LIST, gross=True, ceiling=True),
    ModuleMutant("last attention left out", "layers", _NO_ATTENTION, _LIST, ceiling=True),
    ModuleMutant("attention scale x 0.9", "attention", _attention_scale(0.9), _SIZES, ceiling=True),
    ModuleMutant("attention scale x 0.99", "attention", _attention_scale(0.99), _FAULTS),
    ModuleMutant("attention scale x 1.001", "attention", _attention_scale(1.001), _FAULTS, ceiling=True),
    ModuleMutant("two heads swapped", "attention", _swap_heads, _FAULTS),
    ModuleMutant("two projections swapped", "attention", _swap_projections, _LIST),
    ModuleMutant("square weight transposed", "attention", _transpose, _EXPORT),
    ModuleMutant("norm epsilon x 10, at least 1e-5", "norms", _epsilon, "design §5", ceiling=True),
    ModuleMutant("one norm without its weight", "norms", _plain_norm, _FAULTS),
    ModuleMutant("final norm, one weight + 0.01", "norms", _final_norm_column, "upstream §5"),
    ModuleMutant("GELU by its other formula", "activations", _other_gelu, _FAULTS),
    ModuleMutant("ReLU in one layer", "activations", _relu, _FAULTS, ceiling=True),
    ModuleMutant("one layer clipped at 2 rms", "activations", _layer_output(-1, _clipped), _LIST),
    ModuleMutant("one bias dropped", "weights", _no_bias, _FAULTS),
    ModuleMutant("garbage in word embeddings", "weights", _garbage_words, _FAULTS),
    ModuleMutant("one row of a weight negated", "weights", _in(finder.outer, _negated_row), "upstream §5"),
    ModuleMutant("one neuron dead", "weights", _filled((slice(None), 0), 0.0), "upstream §5"),
    ModuleMutant("first layer's weights x 1.02", "weights", _scale_first_layer, _LIST),
    ModuleMutant("NaN in one weight", "weights", _filled((0, 0), float("nan")), _LIST, gross=True),
    ModuleMutant("weights rounded to fp16", "numbers", _round_weights(torch.float16), _SIZES),
    ModuleMutant("weights rounded to bf16", "numbers", _round_weights(torch.bfloat16), _SIZES),
    ModuleMutant("weights rounded to MXFP6", "numbers", _compress_weights, _LIST),
    ModuleMutant("positions + 1", "positions", _later, _SIZES),
    ModuleMutant("rotary base x 2", "positions", _rotary_base, "upstream §5"),
    ModuleMutant("window one token wider", "masks", _wider_window, "design §5"),
)
"""Positions + 1 are the same to a model with rotary embeddings alone: a mutant that the rule must find equivalent."""
