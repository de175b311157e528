# SPDX-License-Identifier: Apache-2.0
"""Shapes of the outputs of frequent operators, for the tensors without content that an export is traced with.

With symbolic dims torch finds these shapes by running an operator's decomposition, each part with checks of strides in
symbolic arithmetic: 8 ms for a linear layer, 24 ms for a matrix product or a LayerNorm. Here are the cases that
transformers consist of; whatever is not one of them goes torch's way. Processor time of an export of MiniLM: 1.5 s
without and 1.2 s with them, of SmolLM2-135M 18 s and 15 s (on a busy machine).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qeff_validate.builders.tensor_writes import same_shape

Kernel = Callable[..., tuple[Sequence[Any], Any] | None]
"""From an operator's arguments to shape and dtype of its contiguous output; None: not a case of these."""


@contextlib.contextmanager
def fake_kernels() -> Iterator[None]:
    """Within this context operators on tensors without content use the kernels of this module."""
    from torch._C import DispatchKey

    key = DispatchKey.CompositeImplicitAutograd  # what is decomposed before a mode for tensors without content sees it
    previous = {}
    for operator, kernel in _kernels().items():
        previous[operator] = operator.py_kernels.get(key)
        operator.py_kernels[key] = _with_fallback(operator, kernel, previous[operator], key)
        operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, kernel in previous.items():
            del operator.py_kernels[key]
            if kernel is not None:
                operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


def _kernels() -> dict[Any, Kernel]:
    from torch import ops

    return {
        ops.aten.linear.default: _linear,
        ops.aten.matmul.default: _matmul,
        ops.aten.layer_norm.default: _layer_norm,
    }


def _with_fallback(operator: Any, kernel: Kernel, previous: Any, key: Any) -> Callable[..., Any]:
    """Return what torch calls with an operator's arguments."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        fake = all(type(tensor) is FakeTensor for tensor in tensors)
        result = kernel(*args, **kwargs) if fake and len({tensor.device for tensor in tensors}) == 1 else None
        if result is not None:
            return tensors[0].new_empty(result[0], dtype=result[1])
        return operator._op_dk(key, *args, **kwargs) if previous is None else previous(*args, **kwargs)

    return run


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    same = isinstance(x.shape[-1], int) and x.shape[-1] == weight.shape[-1]
    if not same or weight.ndim != 2 or not _one_dtype(x, weight, *(() if bias is None else (bias,))):
        return None
    return (*x.shape[:-1], weight.shape[0]), x.dtype


def _matmul(a: Any, b: Any) -> Any:
    if min(a.ndim, b.ndim) < 2 or not _one_dtype(a, b) or not same_shape(a.shape[-1:], b.shape[-2:-1]):
        return None
    if b.ndim > 2 and not same_shape(a.shape[:-2], b.shape[:-2]):
        return None
    return (*a.shape[:-1], b.shape[-1]), a.dtype


def _layer_norm(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Any:
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    shapes = [tuple(normalized_shape), *(tuple(parameter.shape) for parameter in parameters)]
    last = tuple(x.shape[x.ndim - len(normalized_shape) :])
    return (x.shape, x.dtype) if set(shapes) == {last} and _one_dtype(x, *parameters) else None


def _one_dtype(*tensors: Any) -> bool:
    return len({tensor.dtype for tensor in tensors}) == 1
