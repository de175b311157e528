# SPDX-License-Identifier: Apache-2.0
"""Let a float32 model compute in float64, one layer at a time where it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from qeff_validate.errors import Unavailable
from qeff_validate.models.sources.exportable_experts import exportable_experts

LARGE = 1 << 28
"""Bytes of float32 weights beyond which a model is widened layer by layer: slower, in half the memory."""


@contextmanager
def few_threads(body: nn.Module) -> Iterator[None]:
    """Let a small body compute on one thread: its operations are too short to wait for a second one."""
    threads = torch.get_num_threads()
    try:
        if sum(p.nbytes for p in body.parameters()) <= LARGE:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def computing_in(body: nn.Module, dtype: str, *, probe: Callable[[], object]) -> Iterator[None]:
    """Let a float32 body compute in ``dtype``; afterwards it is float32 again, bit for bit.

    A large body is widened to float64 one layer at a time, while that layer runs, so that its weights never stand in
    memory twice. ``probe`` runs the body once: if its layers are used in another way than by calling them, all of it
    is widened at once.
    """
    if dtype == "float32":
        yield
        return
    try:
        with exportable_experts(body), ExitStack() as held:
            if sum(p.nbytes for p in body.parameters()) > LARGE and _widened_by_layer(body, held, probe):
                yield
                return
            held.close()
            nn.Module.double(body)  # transformers' own refuses models that came from a quantized file
            yield
    finally:
        nn.Module.float(body)


def _widened_by_layer(body: nn.Module, held: ExitStack, probe: Callable[[], object]) -> bool:
    layers = _layers(body)
    inside = {module for layer in layers for module in layer.modules()}
    for module in body.modules():
        if module not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    for layer in layers:
        held.callback(layer.register_forward_pre_hook(_widen).remove)
        held.callback(layer.register_forward_hook(_narrow).remove)
    try:
        probe()
    except Unavailable:
        return False
    return True


def _widen(layer: nn.Module, _: object) -> None:
    layer.double()


def _narrow(layer: nn.Module, *_: object) -> None:
    layer.float()


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: what transformers stacks."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]
