# SPDX-License-Identifier: Apache-2.0
"""Finds the modules of a transformers model by structure: layers, projections, norms, activations, positions.

No architecture is listed here. The names of modules differ between architectures; their classes, whether they belong
to an attention, and the order in which they run do not. The order is found by running the model on three tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qeff_validate.mutation.mutant import Inapplicable, Patch

Named: TypeAlias = tuple[str, Any]
"""A module and its path in the model."""

_PROJECTIONS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(rf"(^|\.){name[0]}({name[1:]})?(_proj|_lin)?(\.base_layer)?$")
    for name in ("query", "key", "value")
}
_STACKED = re.compile(r"(^|\.)Wqkv(\.base_layer)?$")
_SCALES = ("scaling", "softmax_scale")


def base_modules(model: Any) -> dict[str, Any]:
    """Return the modules by path, without those of adapters."""
    all_modules = dict(model.named_modules())
    adapted = tuple(f"{path}." for path, module in all_modules.items() if hasattr(module, "base_layer"))

    def of_adapter(path: str) -> bool:
        return any(path.startswith(prefix) and not path.startswith(f"{prefix}base_layer") for prefix in adapted)

    return {path: module for path, module in all_modules.items() if not of_adapter(path)}


def layer_stack(model: Any, min_layers: int = 1) -> tuple[str, nn.ModuleList]:
    """Return the layers and their path: the largest list of modules that is in no other list.

    Raises:
        Inapplicable: there is no list, or it has fewer layers.
    """
    lists = {path: module for path, module in base_modules(model).items() if isinstance(module, nn.ModuleList)}
    nested = {path for path in lists if any(path.startswith(f"{other}.") for other in lists)}
    stacks = {path: layers for path, layers in lists.items() if path not in nested}
    if not stacks:
        raise Inapplicable("the model has no list of layers")
    path = max(stacks, key=lambda name: sum(weight.numel() for weight in stacks[name].parameters()))
    if len(stacks[path]) < min_layers:
        raise Inapplicable(f"the model has no {min_layers} layers with weights of their own")
    return path, stacks[path]


def in_order(model: Any, is_kind: Callable[[str, Any], bool]) -> list[Named]:
    """Return the modules for which ``is_kind(path, module)`` is true, in the order in which they first run."""
    order: dict[str, Any] = {}
    with Patch() as patch, torch.no_grad():
        for path, module in base_modules(model).items():
            if is_kind(path, module):

                def record(module: Any, *_: Any, path: str = path) -> None:
                    order.setdefault(path, module)

                patch.hook(module.register_forward_hook(record))
        model(input_ids=torch.tensor([[1, 2, 3]], device=model.get_input_embeddings().weight.device))
    return list(order.items())


def in_layer(model: Any, index: int, is_kind: Callable[[str, Any], bool]) -> list[Named]:
    """Return the same for the layer of an index, with paths relative to it."""
    path, layers = layer_stack(model)
    prefix = f"{path}.{range(len(layers))[index]}."
    return [(name.removeprefix(prefix), module) for name, module in in_order(model, is_kind) if name.startswith(prefix)]


def is_linear(path: str, module: Any) -> bool:  # noqa: ARG001
    """Return True for a linear layer."""
    return isinstance(module, nn.Linear | Conv1D)


def is_norm(path: str, module: Any) -> bool:  # noqa: ARG001
    """Return True for a normalization with a weight."""
    return (
        "Norm" in type(module).__name__
        and epsilon_of(module) is not None
        and getattr(module, "weight", None) is not None
    )


def is_activation(path: str, module: Any) -> bool:
    """Return True for an activation function."""
    without_weights = next(module.children(), None) is None and next(module.parameters(), None) is None
    named = "act" in path.rpartition(".")[2] and not isinstance(module, nn.Dropout | nn.Identity)
    return without_weights and named and _maps_tensors(module)


def _maps_tensors(module: Any) -> bool:
    """Return True if a module takes one tensor and returns one; those of I-BERT return scales besides."""
    try:
        with torch.no_grad():
            return isinstance(module(torch.zeros(3)), torch.Tensor)
    except Exception:  # of somebody else's code
        return False


def epsilon_of(norm: Any) -> str | None:
    """Return the name of a norm's attribute for its epsilon; None if it has none."""
    return next((name for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)


def in_attention(path: str) -> bool:
    """Return True for a path within a layer that belongs to its attention."""
    return "att" in path.lower()


def norms(model: Any) -> list[Any]:
    """Return the norms in the order in which they run; at least one."""
    modules = [module for _, module in in_order(model, is_norm)]
    if not modules:
        raise Inapplicable("the model has no norm with a weight and an epsilon")
    return modules


def attention_output(model: Any) -> Any:
    """Return the output projection of the attention in the last layer."""
    linear = [module for path, module in in_layer(model, -1, is_linear) if in_attention(path)]
    if not linear:
        raise Inapplicable("the last layer has no linear layer in an attention")
    return linear[-1]


def feed_forward_output(model: Any) -> Any:
    """Return the last linear layer of the feed-forward part in the last layer; without such a part, of the layer."""
    linear = in_layer(model, -1, is_linear)
    if not linear:
        raise Inapplicable("the last layer has no linear layer")
    return next((module for path, module in reversed(linear) if not in_attention(path)), linear[-1][1])


def projections(model: Any) -> dict[str, Any]:
    """Return the separate projections in the last layer's attention by ``query``, ``key`` and ``value``."""
    linear = [(path, module) for path, module in in_layer(model, -1, is_linear) if in_attention(path)]
    return {name: module for name, wanted in _PROJECTIONS.items() for path, module in linear if wanted.search(path)}


def scales(model: Any) -> list[tuple[Any, str]]:
    """Return the modules and attributes that scale attention scores; empty if attentions have no such attribute."""
    modules = [module for path, module in base_modules(model).items() if in_attention(path)]
    return [(module, name) for module in modules for name in _SCALES if isinstance(getattr(module, name, None), float)]


def queries(model: Any) -> list[tuple[Any, int]]:
    """Return the linear layers that compute queries, each with the number of its outputs that are queries."""
    linear = {path: module for path, module in base_modules(model).items() if is_linear(path, module)}
    separate = [(module, _outputs(module)) for path, module in linear.items() if _PROJECTIONS["query"].search(path)]
    return separate or [(module, _outputs(module) // 3) for path, module in linear.items() if _STACKED.search(path)]


def rewrite(patch: Patch, linear: Any, edit: Callable[[Tensor], Tensor]) -> None:
    """Replace the weight of a linear layer; ``edit`` takes a copy as ``[out, in]`` and returns the new weight."""
    transposed = isinstance(linear, Conv1D)
    weight = linear.weight.detach().clone()
    value = edit(weight.T if transposed else weight)
    patch.tensor(linear.weight, value.T if transposed else value)


def _outputs(linear: Any) -> int:
    return int(linear.weight.shape[1 if isinstance(linear, Conv1D) else 0])
