# SPDX-License-Identifier: Apache-2.0
"""Finds the parts of a transformers model by structure: layers, projections, norms, activations, positions.

No architecture is listed here. What a part is called differs everywhere; what class it has, whether it lies in an
attention, and in which order parts run does not. The order is asked of the model, by running it on three tokens.
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
"""A path in the model, and the module there."""

_PROJECTIONS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(rf"(^|\.){name[0]}({name[1:]})?(_proj|_lin)?(\.base_layer)?$")
    for name in ("query", "key", "value")
}
_STACKED = re.compile(r"(^|\.)Wqkv(\.base_layer)?$")
_SCALES = ("scaling", "softmax_scale")


def own(model: Any) -> dict[str, Any]:
    """Return the modules by path, without those of adapters."""
    everything = dict(model.named_modules())
    adapted = tuple(f"{path}." for path, module in everything.items() if hasattr(module, "base_layer"))

    def added(path: str) -> bool:
        return any(path.startswith(start) and not path.startswith(f"{start}base_layer") for start in adapted)

    return {path: module for path, module in everything.items() if not added(path)}


def stack(model: Any, least: int = 1) -> tuple[str, nn.ModuleList]:
    """Return the layers and their path: the largest list of modules that lies in no other list."""
    lists = {path: module for path, module in own(model).items() if isinstance(module, nn.ModuleList)}
    outer = {path: made for path, made in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise Inapplicable("the model has no list of layers")
    path = max(outer, key=lambda name: sum(weight.numel() for weight in outer[name].parameters()))
    if len(outer[path]) < least:
        raise Inapplicable(f"the model has no {least} layers with weights of their own")
    return path, outer[path]


def called(model: Any, is_kind: Callable[[str, Any], bool]) -> list[Named]:
    """Return the modules of a kind in the order in which they first run."""
    order: dict[str, Any] = {}
    with Patch() as patch, torch.no_grad():
        for path, module in own(model).items():
            if is_kind(path, module):

                def note(module: Any, *_: Any, path: str = path) -> None:
                    order.setdefault(path, module)

                patch.hook(module.register_forward_hook(note))
        model(input_ids=torch.tensor([[1, 2, 3]], device=model.get_input_embeddings().weight.device))
    return list(order.items())


def in_layer(model: Any, index: int, is_kind: Callable[[str, Any], bool]) -> list[Named]:
    """Return the same for one layer, with paths that start there."""
    path, layers = stack(model)
    start = f"{path}.{range(len(layers))[index]}."
    return [(name[len(start) :], made) for name, made in called(model, is_kind) if name.startswith(start)]


def is_linear(path: str, module: Any) -> bool:  # noqa: ARG001
    """Tell a product with a weight."""
    return isinstance(module, nn.Linear | Conv1D)


def is_norm(path: str, module: Any) -> bool:  # noqa: ARG001
    """Tell a normalization that has a weight."""
    return "Norm" in type(module).__name__ and epsilon_of(module) is not None and module.weight is not None


def is_activation(path: str, module: Any) -> bool:
    """Tell an activation function."""
    plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    return plain and "act" in path.rpartition(".")[2] and not isinstance(module, nn.Dropout | nn.Identity)


def epsilon_of(norm: Any) -> str | None:
    """Return what the epsilon of a norm is called."""
    return next((name for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)


def in_attention(path: str) -> bool:
    """Tell whether a path within a layer is a part of its attention."""
    return "att" in path.lower()


def norms(model: Any) -> list[Any]:
    """Return the norms that run, the last one last."""
    found = [module for _, module in called(model, is_norm)]
    if not found:
        raise Inapplicable("the model has no norm with a weight and an epsilon")
    return found


def attention_output(model: Any) -> Any:
    """Return the projection that the attention of the last layer ends with."""
    found = [module for path, module in in_layer(model, -1, is_linear) if in_attention(path)]
    if not found:
        raise Inapplicable("the last layer has no linear layer in an attention")
    return found[-1]


def outer(model: Any) -> Any:
    """Return the linear layer that the feed-forward part of the last layer ends with; if it has none, any last one."""
    found = in_layer(model, -1, is_linear)
    if not found:
        raise Inapplicable("the last layer has no linear layer")
    return next((module for path, module in reversed(found) if not in_attention(path)), found[-1][1])


def projections(model: Any) -> dict[str, Any]:
    """Return those of the last layer that are no part of a greater one, by ``query``, ``key`` and ``value``."""
    linear = [(path, module) for path, module in in_layer(model, -1, is_linear) if in_attention(path)]
    return {name: module for name, wanted in _PROJECTIONS.items() for path, module in linear if wanted.search(path)}


def scales(model: Any) -> list[tuple[Any, str]]:
    """Return the attributes that attention scores are multiplied with; empty if attentions have none."""
    modules = [module for path, module in own(model).items() if in_attention(path)]
    return [(made, name) for made in modules for name in _SCALES if isinstance(getattr(made, name, None), float)]


def queries(model: Any) -> list[tuple[Any, int]]:
    """Return the layers that make the queries, and how many of their outputs these are."""
    linear = {path: module for path, module in own(model).items() if is_linear(path, module)}
    alone = [(made, _outputs(made)) for path, made in linear.items() if _PROJECTIONS["query"].search(path)]
    return alone or [(made, _outputs(made) // 3) for path, made in linear.items() if _STACKED.search(path)]


def rewrite(patch: Patch, linear: Any, made: Callable[[Tensor], Tensor]) -> None:
    """Replace a weight by what is made of a copy that is turned to ``[out, in]``."""
    turned = isinstance(linear, Conv1D)
    weight = linear.weight.detach().clone()
    value = made(weight.T if turned else weight)
    patch.tensor(linear.weight, value.T if turned else value)


def _outputs(linear: Any) -> int:
    return int(linear.weight.shape[1 if isinstance(linear, Conv1D) else 0])
