# SPDX-License-Identifier: Apache-2.0
"""Activations that files of sentence-transformers name: as torch modules, and in float64 for the reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

VectorFunction = Callable[[Floats], Floats]
"""Maps vectors ``[…, in]`` to ``[…, out]``."""


def activation(name: Any) -> nn.Module:
    """Return the activation of a Dense module; one outside of ``torch.nn`` is tanh, as in sentence-transformers.

    Raises:
        ConfigError: ``torch.nn`` has no such class, or one that needs arguments, which no file holds.
    """
    from torch import nn
    from torch.nn.modules.lazy import LazyModuleMixin

    if not isinstance(name, str) or not name.startswith("torch.nn."):
        return nn.Tanh()
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"activation_function {name!r} is no class of torch.nn") from exc
    if not (isinstance(found, type) and issubclass(found, nn.Module)) or issubclass(found, LazyModuleMixin):
        raise ConfigError(f"activation_function {name!r} is no module of torch.nn")
    try:
        created: nn.Module = found()
    except TypeError as exc:
        raise ConfigError(
            f"activation_function {name!r} needs arguments, and the files of sentence-transformers hold none: {exc}"
        ) from exc
    return created.eval()  # RReLU and Dropout draw random numbers in training


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Put weights into a module.

    Raises:
        ConfigError: one is missing, too many, or of another shape; the message names it.
    """
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    got = {name: list(tensor.shape) for name, tensor in weights.items()}
    problems = [f"{name} is missing" for name in wanted if name not in got]
    problems += [f"{name} is none of its weights" for name in got if name not in wanted]
    problems += [
        f"{name} has the shape {got[name]}, and its config asks for {shape}"
        for name, shape in wanted.items()
        if got.get(name, shape) != shape
    ]
    if problems:
        raise ConfigError(f"the weights of {what} do not fit: {'; '.join(problems)}")
    module.load_state_dict(dict(weights))


def activation_oracle(name: str, weights: Mapping[str, Floats] = {}) -> VectorFunction:
    """Return an activation as a function in float64; the frequent ones share no formula with torch's.

    Args:
        name: path of the class.
        weights: of the activation itself, by name; a PReLU has some.
    """
    if name.endswith(".Tanh") or not name.startswith("torch.nn."):
        return lambda values: np.asarray(np.tanh(values))
    if name.endswith(".Identity"):
        return lambda values: values
    if name.endswith(".Sigmoid"):
        return lambda values: np.asarray(0.5 * (1 + np.tanh(values / 2)))

    def function(values: Floats) -> Floats:
        import torch

        module = activation(name).double()
        load_weights(module, {key: torch.from_numpy(array) for key, array in weights.items()}, name)
        with torch.inference_mode():
            result: Floats = module(torch.from_numpy(np.ascontiguousarray(values))).numpy()
        return result

    return function
