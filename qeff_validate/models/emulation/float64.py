# SPDX-License-Identifier: Apache-2.0
"""Runs a float32 model in float64; a large one is converted layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from qeff_validate.errors import Unavailable
from qeff_validate.models.sources.exportable_experts import exportable_experts

LARGE = 1 << 28
"""Bytes of float32 weights above which a model is converted layer by layer: slower, but with half the memory."""


@contextmanager
def one_thread_if_small(body: nn.Module) -> Iterator[None]:
    """Run a small body on one thread until the context ends: its operations are too short to split."""
    threads = torch.get_num_threads()
    try:
        if sum(p.nbytes for p in body.parameters()) <= LARGE:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def compute_in_dtype(body: nn.Module, dtype: str, *, probe: Callable[[], object]) -> Iterator[None]:
    """Run a float32 body in ``dtype`` until the context ends; afterwards it is float32 again, with identical bits.

    A large body is converted to float64 one layer at a time, while that layer runs, so that memory holds no second copy
    of all weights.

    Args:
        body: float32.
        dtype: ``float32`` or ``float64``.
        probe: runs the body once. If its layers are not called as modules, it is converted as a whole.
    """
    if dtype == "float32":
        yield
        return
    try:
        with exportable_experts(body), ExitStack() as stack:
            if sum(p.nbytes for p in body.parameters()) > LARGE and _convert_by_layer(body, stack, probe):
                yield
                return
            stack.close()
            nn.Module.double(body)  # transformers' override refuses models loaded from a quantized file
            yield
    finally:
        nn.Module.float(body)


def _convert_by_layer(body: nn.Module, stack: ExitStack, probe: Callable[[], object]) -> bool:
    layers = _layers(body)
    layer_modules = {module for layer in layers for module in layer.modules()}
    for module in body.modules():
        if module not in layer_modules:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    for layer in layers:
        stack.callback(layer.register_forward_pre_hook(_to_float64).remove)
        stack.callback(layer.register_forward_hook(_to_float32).remove)
    try:
        probe()
    except Unavailable:
        return False
    return True


def _to_float64(layer: nn.Module, _: object) -> None:
    layer.double()


def _to_float32(layer: nn.Module, *_: object) -> None:
    layer.float()


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: the stacked layers of a transformers model."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]
