# SPDX-License-Identifier: Apache-2.0
"""Mutants of the transformers model, for embeddings and for language models: typical errors of a port.

Each change takes any body or causal LM, with or without adapters, in float32 or float64, and goes through `Patch`
alone, so that the model is restored bit for bit. A change of one layer is in the last one unless its name says
otherwise: no later layer amplifies the error, so a bound that finds it there finds it in any layer.
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
"""Points at which activation functions are compared."""

GARBAGE = slice(7, None, 32)
"""Rows of the word embeddings: they hold some words of any text and no special token of the usual vocabularies."""


def _restack(order: Callable[[list[Any]], list[Any]]) -> Change:
    def change(model: Any, patch: Patch) -> None:
        path, layers = finder.layer_stack(model, min_layers=2)
        parent, _, name = path.rpartition(".")
        patch.attribute(model.get_submodule(parent), name, nn.ModuleList(order(list(layers))))

    return change


def _swap_first_two(layers: list[Any]) -> list[Any]:
    return [layers[1], layers[0], *layers[2:]]


def _layer_output(index: int, edit: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Return a change of a layer's output; ``edit`` takes the layer's input and output."""

    def hook(layer: Any, args: Any, kwargs: Any, out: Any) -> Any:  # noqa: ARG001
        before = args[0] if args else kwargs["hidden_states"]
        return (edit(before, out[0]), *out[1:]) if isinstance(out, tuple) else edit(before, out)

    def change(model: Any, patch: Patch) -> None:
        layer = finder.layer_stack(model)[1][index]
        patch.hook(layer.register_forward_hook(hook, with_kwargs=True))

    return change


def _clipped(before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    limit = 2 * after.square().mean(-1, keepdim=True).sqrt()
    return after.clamp(-limit, limit)


def _attention_scale(factor: float) -> Change:
    def change(model: Any, patch: Patch) -> None:
        scales = finder.scales(model)
        for module, name in scales:
            patch.attribute(module, name, getattr(module, name) * factor)
        queries = [] if scales else finder.queries(model)
        if not scales and not queries:
            raise Inapplicable("attention has neither a scale nor a query projection of its own")
        for linear, width in queries:
            finder.rewrite(patch, linear, partial(_scale_rows, first=width, factor=factor))
            if linear.bias is not None:
                patch.tensor(linear.bias, _scale_rows(linear.bias.detach().clone(), width, factor))

    return change


def _scale_rows(values: Tensor, first: int, factor: float) -> Tensor:
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
    projections = finder.projections(model)
    for first, second in (("query", "key"), ("key", "value")):
        if not {first, second} <= projections.keys():
            continue
        if projections[first].weight.shape == projections[second].weight.shape:
            for name in ("weight", "bias"):
                left, right = getattr(projections[first], name), getattr(projections[second], name)
                if left is not None and right is not None:
                    copy = left.detach().clone()
                    patch.tensor(left, right.detach())
                    patch.tensor(right, copy)
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
    norms = finder.in_layer(model, -1, finder.is_norm)
    if not norms:
        raise Inapplicable("the last layer has no norm with a weight")
    norm, weight = norms[-1][1], norms[-1][1].weight
    patch.tensor(weight, torch.zeros_like(weight))
    bias = 0 if getattr(norm, "bias", None) is None else norm.bias
    probe = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device).view_as(weight)
    adds_one = bool((norm(probe) - bias).any())  # some families multiply by 1 + weight
    patch.tensor(weight, torch.full_like(weight, 0.0 if adds_one else 1.0))


def _final_norm_column(model: Any, patch: Patch) -> None:
    weight = finder.norms(model)[-1].weight
    value = weight.detach().clone()
    value.view(-1)[0] += 1e-2
    patch.tensor(weight, value)


def _other_gelu(model: Any, patch: Patch) -> None:
    exact, fast = gelu(GRID), gelu(GRID, approximate="tanh")
    replaced = 0
    for _, module in finder.in_order(model, finder.is_activation):
        value = module(GRID)
        for known, other in ((exact, "tanh"), (fast, "none")):
            if torch.allclose(value, known, rtol=0, atol=1e-6):
                replaced += 1
                patch.hook(module.register_forward_hook(_replacing(partial(gelu, approximate=other))))
    if not replaced:
        raise Inapplicable("the model has no GELU")


def _relu(model: Any, patch: Patch) -> None:
    activations = finder.in_layer(model, -1, finder.is_activation)
    if not activations or torch.equal(activations[-1][1](GRID), torch.relu(GRID)):
        raise Inapplicable("the last layer has no activation that is not ReLU already")
    patch.hook(activations[-1][1].register_forward_hook(_replacing(torch.relu)))


def _replacing(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a forward hook that computes another function of the module's input."""
    return lambda module, args, out: function(args[0])  # noqa: ARG005


def _in_weight(find: Callable[[Any], Any], edit: Callable[[Tensor], Tensor]) -> Change:
    """Return a change of the weight, as ``[out, in]``, of the linear layer that ``find`` returns."""
    return lambda model, patch: finder.rewrite(patch, find(model), edit)


def _no_bias(model: Any, patch: Patch) -> None:
    # from the end: the bias of the keys has no effect in an attention
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
        for module in finder.base_modules(model).values():
            for weight in module.parameters(recurse=False):
                patch.tensor(weight, weight.detach().to(dtype))

    return change


def _compress_weights(model: Any, patch: Patch) -> None:
    words = model.get_input_embeddings().weight
    for path, module in finder.base_modules(model).items():
        if finder.is_linear(path, module) and module.weight is not words:
            finder.rewrite(patch, module, lambda weight: in_blocks(weight.float(), E2M3, 1))
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:  # experts
                patch.tensor(weight, in_blocks(weight.detach().float(), E2M3, -1))


def _scale_first_layer(model: Any, patch: Patch) -> None:
    for module in finder.base_modules(finder.layer_stack(model)[1][0]).values():
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:
                patch.tensor(weight, weight.detach() * 1.02)


def _positions_plus_one(model: Any, patch: Patch) -> None:
    modules = finder.base_modules(model)
    tables = [
        module
        for path, module in modules.items()
        if isinstance(module, nn.Embedding) and re.search("pos|wpe|rel", path.rpartition(".")[2])
    ]
    for table in tables:
        patch.tensor(table.weight, torch.roll(table.weight.detach(), -1, 0))
    rotary = [] if tables else [module for module in modules.values() if "Rotary" in type(module).__name__]

    def plus_one(value: Any) -> Any:
        return value + 1 if isinstance(value, Tensor) and not value.is_floating_point() else value

    def shift(module: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
        return tuple(map(plus_one, args)), {name: plus_one(value) for name, value in kwargs.items()}

    for module in rotary:
        patch.hook(module.register_forward_pre_hook(shift, with_kwargs=True))
    if not tables and not rotary:
        raise Inapplicable("the model has no table of positions and no rotary embedding")


def _rotary_base(model: Any, patch: Patch) -> None:
    frequencies = [buffer for name, buffer in model.named_buffers() if "inv_freq" in name.rpartition(".")[2]]
    if not frequencies:
        raise Inapplicable("the model has no rotary frequencies")
    for buffer in frequencies:
        share = torch.arange(len(buffer), dtype=buffer.dtype, device=buffer.device) / len(buffer)
        patch.tensor(buffer, buffer * 2.0**-share)


def _wider_window(model: Any, patch: Patch) -> None:
    window = getattr(model.config, "sliding_window", None)
    if not isinstance(window, int):
        raise Inapplicable("the model has no sliding window")
    patch.attribute(model.config, "sliding_window", window + 1)


def _filled(index: tuple[Any, ...], value: float) -> Change:
    def edit(weight: Tensor) -> Tensor:
        weight[index] = value
        return weight

    return _in_weight(finder.feed_forward_output, edit)


def _negated_row(weight: Tensor) -> Tensor:
    return torch.cat([weight[:-1], -weight[-1:]])  # the first may be zero (`decisive_routers`)


_LIST, _SIZES = "validation-methods §12.6", "upstream §6"
_FAULTS, _EXPORT = "tests/meta/test_faults.py", "upstream §7"
_NEGATE_ROW = _in_weight(finder.feed_forward_output, _negated_row)
_DROP_LAST = _restack(lambda layers: layers[:-1])
_SKIP_FIRST = _layer_output(0, lambda before, _: before)
_NO_ATTENTION = _in_weight(finder.attention_output, torch.zeros_like)

MODULE_MUTANTS: tuple[ModuleMutant, ...] = (
    ModuleMutant("last layer dropped", "layers", _DROP_LAST, _SIZES, gross=True, ceiling=True),
    ModuleMutant("first two layers swapped", "layers", _restack(_swap_first_two), _FAULTS, gross=True),
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
    ModuleMutant("one row of a weight negated", "weights", _NEGATE_ROW, "upstream §5"),
    ModuleMutant("one neuron dead", "weights", _filled((slice(None), 0), 0.0), "upstream §5"),
    ModuleMutant("first layer's weights x 1.02", "weights", _scale_first_layer, _LIST),
    ModuleMutant("NaN in one weight", "weights", _filled((0, 0), float("nan")), _LIST, gross=True),
    ModuleMutant("weights rounded to fp16", "numbers", _round_weights(torch.float16), _SIZES),
    ModuleMutant("weights rounded to bf16", "numbers", _round_weights(torch.bfloat16), _SIZES),
    ModuleMutant("weights rounded to MXFP6", "numbers", _compress_weights, _LIST),
    ModuleMutant("positions + 1", "positions", _positions_plus_one, _SIZES),
    ModuleMutant("rotary base x 2", "positions", _rotary_base, "upstream §5"),
    ModuleMutant("window one token wider", "masks", _wider_window, "design §5"),
)
"""Positions + 1 change nothing in a model with rotary embeddings alone: the rule must find that mutant equivalent."""
