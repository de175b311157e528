# SPDX-License-Identifier: Apache-2.0
"""Runs a float32 model in float64; a large one is converted layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qeff_validate.errors import Unavailable
from qeff_validate.models.scratch import scratch_tensor
from qeff_validate.models.sources.exportable_experts import exportable_experts

LARGE = 1 << 28
"""Bytes of float32 weights above which a model is converted layer by layer: slower, but with half the memory."""


def is_large(model: nn.Module) -> bool:
    """Return whether a model has more than `LARGE` bytes of weights."""
    return sum(p.nbytes for p in model.parameters()) > LARGE


@contextmanager
def one_thread_if_small(body: nn.Module) -> Iterator[None]:
    """Run a small body on one thread until the context ends: its operations are too short to split."""
    threads = torch.get_num_threads()
    try:
        if not is_large(body):
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def compute_in_dtype(
    body: nn.Module, dtype: str, *, probe: Callable[[], object], by_layer: bool = False
) -> Iterator[None]:
    """Run a float32 body in ``dtype`` until the context ends; afterwards it has its own float32 tensors again.

    A large body is converted to float64 one layer at a time, while that layer runs, so that memory holds no second copy
    of all weights. Its float32 weights stay where they are: those of a file that is mapped are never in memory of the
    process's own.

    Args:
        body: float32.
        dtype: ``float32`` or ``float64``.
        probe: runs the body once. If its layers are not called as modules, it is converted as a whole.
        by_layer: convert a small body one layer at a time too.
    """
    if dtype == "float32":
        yield
        return
    try:
        with exportable_experts(body), ExitStack() as stack:
            if (by_layer or is_large(body)) and _convert_by_layer(body, stack, probe):
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
    outside = Widened(scratch_tensor)
    stack.callback(outside.restore)
    outside.widen(_tensors(module for module in body.modules() if module not in layer_modules))
    conversion = _RunningLayers()
    for layer in layers:
        stack.callback(layer.register_forward_pre_hook(conversion.before).remove)
        stack.callback(layer.register_forward_hook(conversion.after, always_call=True).remove)
    try:
        probe()
    except (Unavailable, RuntimeError):  # of torch, where the probe does not translate it
        return False
    return True


class Widened:
    """Float32 tensors whose content is float64 until they are restored.

    Args:
        allocate: makes the memory of a content.
    """

    def __init__(self, allocate: Callable[..., Tensor] = torch.empty) -> None:
        self._allocate = allocate
        self._originals: list[tuple[Tensor, Tensor]] = []
        self._memory: dict[tuple[torch.Size, int], Tensor] = {}

    def widen(self, tensors: Iterable[Tensor]) -> None:
        """Give each float32 tensor float64 content, in the memory of earlier ones of its shape, if there were any."""
        counts: dict[torch.Size, int] = {}
        for tensor in tensors:
            if tensor.dtype != torch.float32:  # another type, or tied to one that is already converted
                continue
            counts[tensor.shape] = count = counts.get(tensor.shape, 0) + 1
            key = tensor.shape, count
            if key not in self._memory:
                self._memory[key] = self._allocate(tensor.shape, dtype=torch.float64)
            self._originals.append((tensor, tensor.data))
            tensor.data = self._memory[key].copy_(tensor.data)

    def restore(self, outputs: object = ()) -> None:
        """Give the tensors their own content again; ``outputs`` that are views of them keep the float64 one."""
        while self._originals:
            tensor, content = self._originals.pop()
            tensor.data = content
        addresses = {memory.untyped_storage().data_ptr() for memory in self._memory.values()}
        leaves = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        if any(leaf.untyped_storage().data_ptr() in addresses for leaf in leaves):
            self._memory.clear()


class _RunningLayers:
    """Hooks that widen a layer while it runs. Layers that follow one another use the same memory."""

    def __init__(self) -> None:
        self._running: list[Widened] = []
        self._idle: list[Widened] = []

    def before(self, layer: nn.Module, _: object) -> None:
        self._running.append(self._idle.pop() if self._idle else Widened())
        self._running[-1].widen(_tensors(layer.modules()))

    def after(self, _layer: nn.Module, _inputs: object, outputs: object) -> None:
        if self._running:  # also called if another hook has failed before ours
            widened = self._running.pop()
            widened.restore(outputs)
            self._idle.append(widened)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: the stacked layers of a transformers model."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]
