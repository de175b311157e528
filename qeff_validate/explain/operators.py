# SPDX-License-Identifier: Apache-2.0
"""What a block of a graph computes in place of a module: tries other formulas on the reference's own inputs.

Each hypothesis is the original module with one change, run on the inputs of its recorded call. The one that gives what
the graph gives is the finding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qeff_validate.explain.attention import attention_hypotheses
from qeff_validate.explain.linear import is_linear, linear_hypotheses
from qeff_validate.explain.norms import is_norm, norm_hypotheses
from qeff_validate.explain.reference_values import Call, Place
from qeff_validate.explain.rotary import frequency_hypotheses
from qeff_validate.explain.tables import table_hypotheses
from qeff_validate.explain.tried_module import TriedModule
from qeff_validate.models.emulation.ensemble import attention_implementation

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "gelu with tanh in place of erf": lambda x: x * 0.5 * (1 + torch.tanh(x / 2**0.5)),
    "silu with tanh in place of sigmoid": lambda x: x * torch.tanh(x),
    "hardswish": functional.hardswish,
    "relu squared": lambda x: torch.relu(x).square(),
    "no activation": lambda x: x,
}

READS = "it reads what"
"""Begins the finding that a module is right, but for its input."""

GRID = torch.linspace(-4, 4, 33, dtype=torch.float64)


def operator_finding(
    root: Any,
    place: Place,
    module: str,
    call: Call,
    observed: Any,
    size: Callable[[Any, Any], float],
    tolerance: float,
    others: Sequence[tuple[str, Any]] = (),
    parent: tuple[str, Call] | None = None,
) -> str:
    """Return what a block computes in place of a module; empty if no hypothesis gives it.

    Args:
        root: the original model, float32.
        place: where the block's output is in the original model.
        module: path of the module that computes it.
        call: the arguments of its recorded call, float64.
        observed: the block's output, in the shape of the original's.
        size: of an error, from the expected and the actual value.
        tolerance: error up to which a hypothesis holds.
        others: paths of modules, and the values that they compute before this one.
        parent: path and recorded call of a module above, if the block's output is beside the module, not in it.
    """
    observed = np.asarray(observed, dtype=np.float64)
    outer = (module, call) if parent is None else parent
    with attention_implementation(root, "eager"):  # as in the recorded run; the copy has a config of its own
        copied = copy.deepcopy(root.get_submodule(outer[0])).double()
    tried = TriedModule(copied, outer[1], outer[0], place)
    if parent is not None:
        tried = TriedModule(copied.get_submodule(module.removeprefix(f"{outer[0]}.")), call, module, place, tried)
    for hypotheses in (*_hypotheses(root, tried, observed, size, tolerance), _other_inputs(tried, others)):
        try:
            with torch.no_grad():
                for text, output in hypotheses:
                    if output.shape == observed.shape and size(output, observed) <= tolerance:
                        return text
        except Exception:  # noqa: S112  # a hypothesis that the module does not take explains nothing
            continue
    return ""


def _hypotheses(
    root: Any, tried: TriedModule, observed: Any, size: Callable[[Any, Any], float], tolerance: float
) -> Iterator[Iterator[tuple[str, Any]]]:
    module, call = tried.module, tried.call
    if is_linear(module):
        yield linear_hypotheses(root, tried.path, module, call, observed, size, tolerance)
    yield table_hypotheses(tried, observed)
    if is_norm(module):
        yield norm_hypotheses(root, tried, observed, size)
    if next(module.children(), None) is None and next(module.parameters(), None) is None:
        yield _activation(module, call)
    yield attention_hypotheses(tried, observed, size)
    yield frequency_hypotheses(tried, observed, size)
    yield swapped_layers(tried)


def _other_inputs(tried: TriedModule, others: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield a module without children on the values of others in place of its input, the nearest first."""
    args, kwargs = tried.call
    if next(tried.module.children(), None) is not None or not args or not isinstance(args[0], Tensor):
        return
    for path, array in reversed(others):
        if array.shape == tuple(args[0].shape):
            call = (torch.from_numpy(array), *args[1:]), kwargs
            text = f"{READS} {path} gives, not its own input"
            yield text, tried.run(call)


def swapped_layers(tried: TriedModule) -> Iterator[tuple[str, Any]]:
    """Yield the module with two of its linear layers of one shape in each other's place."""
    linear = [(name, child) for name, child in tried.module.named_children() if isinstance(child, nn.Linear)]
    for (first, left), (second, right) in itertools.combinations(linear, 2):
        if left.weight.shape == right.weight.shape:
            setattr(tried.module, first, right)
            setattr(tried.module, second, left)
            yield f"{first} and {second} are swapped", tried.run()
            setattr(tried.module, first, left)
            setattr(tried.module, second, right)


def _activation(module: Any, call: tuple[Any, Any]) -> Iterator[tuple[str, Any]]:
    given = call[0][0] if call[0] else next(iter(call[1].values()), None)
    if not isinstance(given, Tensor):
        return
    try:
        own = module(GRID)
    except Exception:  # it takes no grid of numbers, so it is no activation
        return
    if not isinstance(own, Tensor) or own.shape != GRID.shape:
        return
    known = next((name for name, f in ACTIVATIONS.items() if torch.allclose(own, f(GRID), atol=1e-9)), None)
    for name, function in ACTIVATIONS.items():
        if name != known:
            yield f"{name} instead of {known or type(module).__name__}", function(given).numpy()


def output_of_zeros(root: Any, path: str, place: Place, call: Call) -> Any:
    """Return what a module without children gives for an input of zeros, float64; None of others."""
    module = copy.deepcopy(root.get_submodule(path)).double()
    if next(module.children(), None) is not None or not call[0] or not isinstance(call[0][0], Tensor):
        return None
    with torch.no_grad():
        return TriedModule(module, ((torch.zeros_like(call[0][0]), *call[0][1:]), call[1]), path, place).run()
