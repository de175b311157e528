# SPDX-License-Identifier: Apache-2.0
"""Values inside the original model: what its modules return, and what their parents compute between them.

A value is the first tensor with its content: the output of a module, or the input of a module that no module has
returned, such as a residual sum, which belongs to the parent. Hooks record them; a second run in another precision
replaces each by its recorded content, so that the difference at each is made there alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qeff_validate.models.emulation.ensemble import attention_implementation
from qeff_validate.models.emulation.float64 import compute_in_dtype, one_thread_if_small
from qeff_validate.models.emulation.microscaling import CompressedWeights
from qeff_validate.models.emulation.precision import (
    DEPENDS_ON_WEIGHTS,
    ComputationVariant,
    Compute,
    emulate_precision,
)
from qeff_validate.models.sources.exportable_experts import exportable_experts
from qeff_validate.prechecks.weights_in_graph import UNUSED
from qeff_validate.protocols import OriginalRun
from qeff_validate.tensors import RETAINED, Tensors

MASK = 1e30
"""Magnitude from which a value is a mask."""

Place = tuple[str, str, int, int]
"""Path of the module whose hook sees a value, ``out`` or ``in``, the index among its tensors, and which call it is."""

Call = tuple[Any, Any]
"""Positional and keyword arguments of a module."""


@dataclass(frozen=True, slots=True)
class ReferenceValue:
    """One value of the original model.

    Attributes:
        module: path of the module that computes it; of an output of the graph, its owner.
        array: float64.
        place: where the hooks see it; None of an output of the graph.
        output: name of the graph's output that it is; else empty.
    """

    module: str
    array: Any
    place: Place | None = None
    output: str = ""

    @property
    def is_state(self) -> bool:
        """True for keys and values, which a graph retains."""
        return self.output.endswith(RETAINED)


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """The values of one run, in the order in which they are computed.

    Attributes:
        values: the outputs of the graph are last.
        calls: of each module, for trying other formulas.
    """

    values: tuple[ReferenceValue, ...]
    calls: Mapping[str, Sequence[Call]]

    def call(self, module: str, place: Place) -> Call | None:
        """Return the arguments with which a module computes the value at a place; None if it is not called.

        Args:
            module: its path.
            place: of its own, or of a module below it that it calls once a call.
        """
        path, _, _, number = place
        calls = self.calls.get(module, ())
        if len(calls) != len(self.calls.get(path, calls)):
            number = len(calls) - 1
        return calls[number] if calls else None


class SoftmaxInFloat64(TorchFunctionMode):
    """Computes each softmax of float64 scores in float64, also where a model asks for float32.

    A mask of float64's least number is -inf in float32, and a row that hides everything, such as one of padding, NaN.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.softmax, torch.softmax, Tensor.softmax) and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": None}
        return func(*args, **kwargs)


def record(original: OriginalRun) -> ReferenceValues:
    """Run the original model in float64, and record its values."""
    root = original.module
    recorder = _Recorder(root)
    outputs: list[Tensors] = []

    def probe() -> None:
        outputs.append(original.run())

    with (
        torch.no_grad(),
        one_thread_if_small(root),
        attention_implementation(root, "eager"),
        SoftmaxInFloat64(),
        recorder.hooks(),
        compute_in_dtype(root, "float64", probe=probe, by_layer=True),
    ):
        if not outputs:  # else it has run already, to see whether it can be converted layer by layer
            recorder.clear()
            probe()
    return ReferenceValues((*recorder.distinct(outputs[0], original.owners),), recorder.calls)


def local_errors(
    original: OriginalRun, values: Sequence[ReferenceValue], compute: Compute, size: Callable[[Any, Any], float]
) -> list[float]:
    """Run the original model in a precision, with each value replaced by its recorded content after it is measured.

    Args:
        original: the run.
        values: from `record`.
        compute: the precision.
        size: of the error, from the reference and the value.

    Returns:
        For each value the error that is made between the values before it and itself.
    """
    return _emulated_errors(original, values, compute, size, forced=True)


def inherited_errors(
    original: OriginalRun,
    values: Sequence[ReferenceValue],
    compute: Compute,
    size: Callable[[Any, Any], float],
    *,
    compressed: bool = False,
) -> list[float]:
    """Run the original model in a precision, and return the error that each value has there, whoever makes it.

    Args:
        original: the run.
        values: from `record`.
        compute: the precision.
        size: of the error, from the reference and the value.
        compressed: products read their weights in MXFP6.
    """
    return _emulated_errors(original, values, compute, size, forced=False, compressed=compressed)


def _emulated_errors(
    original: OriginalRun,
    values: Sequence[ReferenceValue],
    compute: Compute,
    size: Callable[[Any, Any], float],
    *,
    forced: bool,
    compressed: bool = False,
) -> list[float]:
    root, errors = original.module, dict[Place, float]()
    by_place = {value.place: value for value in values if value.place is not None}

    def measure(place: Place, tensor: Tensor) -> Tensor:
        value = by_place.get(place)
        if value is None or value.array.shape != tuple(tensor.shape):
            return tensor
        got = tensor.detach().to(torch.float16 if compute == "fp16" else torch.float32).double().numpy()
        errors[place] = size(value.array, got)
        if not forced:
            return tensor
        content = torch.from_numpy(value.array).to(tensor.dtype)
        setattr(content, DEPENDS_ON_WEIGHTS, True)  # rounded when it is read, as the tensor that it stands for
        return content

    variant = ComputationVariant("explanation")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(one_thread_if_small(root))
        stack.enter_context(attention_implementation(root, "eager"))
        stack.enter_context(exportable_experts(root))
        stack.enter_context(replaced(root, measure))
        if compressed:
            stack.enter_context(CompressedWeights(root))
        stack.enter_context(emulate_precision(root, compute, variant))
        outputs = original.run()
    return [
        errors.get(value.place, float("nan")) if value.place is not None else size(value.array, outputs[value.output])
        for value in values
    ]


def _is_comparable(value: ReferenceValue) -> bool:
    """Return True unless a value is constant, a mask, or of a pooler, which pooled models do not run."""
    array = value.array
    if array.size < 2 or UNUSED in value.module.split("."):
        return False
    return bool(np.isfinite(array).all() and np.abs(array).max() < MASK and np.ptp(array) > 0)


class _Recorder:
    """Records the values of a run.

    Args:
        root: the model.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._numbers = root, Counter[str]()
        self._seen: dict[tuple[Any, ...], Any] = {}
        self._found: list[ReferenceValue] = []
        self.calls: dict[str, list[Call]] = {}

    def hooks(self) -> Any:
        """Return the context in which a run is recorded."""
        return replaced(self._root, self._take, self._call, self._numbers)

    def clear(self) -> None:
        """Forget a run that did not come to its end."""
        self._seen.clear()
        self._found.clear()
        self.calls.clear()
        self._numbers.clear()

    def _call(self, path: str, args: Any, kwargs: Any) -> None:
        self.calls.setdefault(path, []).append((args, kwargs))

    def _take(self, place: Place, tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        content, known = tensor.detach().double().numpy(), self._seen.get(key)
        if known is None or not np.array_equal(
            known, content, equal_nan=True
        ):  # else another's memory, or changed since
            self._seen[key] = content.copy()
            path, side, _, _ = place
            module = path if side == "out" else path.rpartition(".")[0]
            self._found.append(ReferenceValue(module, self._seen[key], place))
        return tensor

    def distinct(self, outputs: Tensors, owners: Mapping[str, str]) -> Iterator[ReferenceValue]:
        """Yield the first value with each content, and then the outputs of the graph."""
        contents: set[bytes] = set()  # digests
        # keys and values are a part of what their attention computes
        whole = {owners[name] for name in outputs if not name.endswith(RETAINED)}
        for value in self._found:
            content = hashlib.blake2b(np.ascontiguousarray(value.array).data).digest()
            if content not in contents and _is_comparable(value) and value.module not in whole:
                contents.add(content)
                yield value
        for name, array in outputs.items():
            yield ReferenceValue(owners[name], np.asarray(array, dtype=np.float64), output=name)


@contextmanager
def replaced(
    root: Any,
    change: Callable[[Place, Tensor], Tensor],
    called: Callable[[str, Any, Any], None] | None = None,
    numbers: Counter[str] | None = None,
) -> Iterator[None]:
    """Pass every real tensor that enters or leaves a submodule through a function, until the context ends.

    Args:
        root: the model; it itself is left out.
        change: gets the place and the tensor, and returns the tensor to go on with.
        called: gets the path and the arguments of each call, before the change.
        numbers: counts the calls of each path; a second run begins with it empty.
    """
    numbers = Counter() if numbers is None else numbers
    with ExitStack() as stack:
        for path, module in root.named_modules():
            if not path:
                continue

            def before(module: Any, args: Any, kwargs: Any, path: str = path) -> Any:  # noqa: ARG001
                if called is not None:
                    called(path, args, kwargs)
                numbers[path] += 1
                return _mapped(args, (path, "in", numbers[path] - 1), change), kwargs

            def after(module: Any, args: Any, out: Any, path: str = path) -> Any:  # noqa: ARG001
                return _mapped(out, (path, "out", numbers[path] - 1), change)

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def _mapped(values: Any, at: tuple[str, str, int], change: Callable[[Place, Tensor], Tensor]) -> Any:
    """Return values with each float tensor changed; of a tuple each element, of other containers none."""
    path, side, number = at
    if isinstance(values, Tensor):
        return change((path, side, 0, number), values) if values.is_floating_point() else values
    if type(values) in (tuple, list):
        changed = [
            change((path, side, index, number), value)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for index, value in enumerate(values)
        ]
        return type(values)(changed)
    return values
