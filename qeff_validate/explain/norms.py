# SPDX-License-Identifier: Apache-2.0
"""What a norm may compute in place of its own: another epsilon, weight or bias, another way to normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qeff_validate.explain.tried_module import TriedModule, changed
from qeff_validate.explain.vectors import vector_hypotheses

EPSILONS = ("eps", "variance_epsilon", "layer_norm_eps")

Size = Callable[[Any, Any], float]


def is_norm(module: Any) -> bool:
    """Return True for a module with an epsilon and a weight."""
    return _epsilon(module) is not None and getattr(module, "weight", None) is not None


def norm_hypotheses(root: Any, tried: TriedModule, observed: Any, size: Size) -> Iterator[tuple[str, Any]]:
    """Yield what a norm gives with one change each, with a name of the change.

    Args:
        root: the original model, whose other norms' weights are tried.
        tried: the norm.
        observed: what the block gives.
        size: of an error, from the expected and the actual value.
    """
    name = _epsilon(tried.module)
    assert name is not None
    yield from _epsilons(tried, name, observed, size)
    yield from _weights(root, tried, observed)
    yield from _other_norms(tried, getattr(tried.module, name))


def _epsilon(module: Any) -> str | None:
    return next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)


def _epsilons(tried: TriedModule, name: str, observed: Any, size: Size) -> Iterator[tuple[str, Any]]:
    before = getattr(tried.module, name)

    def with_epsilon(value: float) -> Any:
        with changed(tried.module, name, value):
            return tried.run()

    ladder = [10.0**power for power in range(-13, 0)]
    errors = [size(with_epsilon(value), observed) for value in ladder]
    best = ladder[int(np.argmin(errors))]
    fine = np.geomspace(best / 10, best * 10, 41)
    value = float(fine[int(np.argmin([size(with_epsilon(item), observed) for item in fine]))])
    for _ in range(4):  # each round narrows the interval tenfold
        step = (fine[1] / fine[0]) if len(fine) > 1 else 1.1
        fine = np.geomspace(value / step, value * step, 21)
        value = float(fine[int(np.argmin([size(with_epsilon(item), observed) for item in fine]))])
    nearest = min(ladder, key=lambda item: abs(np.log(item / value)))
    shown = nearest if abs(np.log(nearest / value)) < 0.05 else value
    yield f"epsilon {shown:.3g} instead of {before:.3g}", with_epsilon(value)


def _weights(root: Any, tried: TriedModule, observed: Any) -> Iterator[tuple[str, Any]]:
    """Yield the norm with other weights: its output is linear in them, so each column determines its own."""
    module = tried.module
    weight, bias = module.weight.data, getattr(module, "bias", None)
    own = weight.numpy().copy(), None if bias is None else bias.data.numpy().copy()

    def run(scale: Any, shift: Any) -> Any:
        weight.copy_(torch.as_tensor(scale))
        if bias is not None:
            bias.data.copy_(torch.as_tensor(shift))
        try:
            return tried.run()
        finally:
            weight.copy_(torch.as_tensor(own[0]))
            if bias is not None:
                bias.data.copy_(torch.as_tensor(own[1]))

    yield "no weight", run(np.ones_like(own[0]), own[1])
    if own[1] is not None:
        yield "no bias", run(own[0], np.zeros_like(own[1]))
        yield "weight and bias are swapped", run(own[1], own[0])
    if own[0].ndim != 1:
        return
    none = np.zeros_like(own[0])
    base = run(none, none)
    if base.shape != observed.shape or base.shape[-1:] != own[0].shape:
        return
    base, normal, given = (
        array.reshape(-1, own[0].size) for array in (base, run(np.ones_like(none), none) - base, observed)
    )
    known = np.isfinite(given).all(axis=1)
    base, normal, given = base[known], normal[known], given[known]
    shift = 0 if own[1] is None else own[1]
    scale = np.einsum("tc,tc->c", normal, given - base - shift) / np.maximum(
        np.einsum("tc,tc->c", normal, normal), 1e-30
    )
    for text, vector in vector_hypotheses(own[0], scale, _others(root, tried, "weight")):
        yield f"weight {text}", run(vector, own[1])
    if own[1] is not None:
        mean = np.mean(given - base - normal * own[0], axis=0)
        for text, vector in vector_hypotheses(own[1], mean, _others(root, tried, "bias")):
            yield f"bias {text}", run(own[0], vector)
    for name, other in _norms(root, tried.path):
        scales: Any = other.weight
        shifts: Any = getattr(other, "bias", None)
        if scales.shape == weight.shape and own[1] is not None and shifts is not None:
            yield f"weight and bias are those of {name}", run(scales.detach(), shifts.detach())


def _others(root: Any, tried: TriedModule, name: str) -> Mapping[str, Any]:
    """Return that parameter of the other norms, float64, where it has the same shape."""
    own, found = getattr(tried.module, name), dict[str, Any]()
    for path, module in _norms(root, tried.path):
        other = getattr(module, name, None)
        if other is not None and other.shape == own.shape:
            found[path] = other.detach().double().numpy()
    return found


def _norms(root: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in root.named_modules() if name != path and is_norm(module))


def _other_norms(tried: TriedModule, epsilon: float) -> Iterator[tuple[str, Any]]:
    args, kwargs = tried.call
    weight, shift = tried.module.weight.data, getattr(tried.module, "bias", None)
    if args and isinstance(args[0], Tensor):
        centred = (args[0] - args[0].mean(-1, keepdim=True), *args[1:]), kwargs
        yield "it subtracts the mean", tried.run(centred)
        scale = args[0].square().mean(-1, keepdim=True).add(epsilon).rsqrt()
        shift = 0 if shift is None else shift
        yield "it does not subtract the mean", (args[0] * scale * weight + shift).numpy()
        yield "it does not normalize", (args[0] * weight + shift).numpy()
