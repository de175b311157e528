# SPDX-License-Identifier: Apache-2.0
"""The weights of a graph beside those of the original model: equal, changed, another module's, or not there.

No run is needed. Weights are found by their content, as they are or transposed; what is left on both sides is paired by
name, else by shape and likeness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qeff_validate.explain.differences import difference, is_named
from qeff_validate.explain.names import common_module
from qeff_validate.explain.weight_layout import read_transposed
from qeff_validate.prechecks.weights_in_graph import UNUSED
from qeff_validate.tensors import Array

MIN_SIZE = 4
"""Elements below which a constant is no weight."""

MOST_REPAIRED = 1 << 26
"""Bytes of weights that differ above which the graph is not run with the right ones."""

TRANSPOSED = "transposed"
"""Text of a square weight that a graph reads the other way."""

HALF_STEP = 2.0**-24
"""The least positive fp16 number. Converters write it for smaller weights, which would be zero otherwise."""

ALIKE = 0.5
"""Share of equal elements, or cosine, from which two tensors of one shape are taken for the same weight."""


@dataclass(frozen=True, slots=True)
class WeightFinding:
    """A weight of the original model that is not in the graph as it is.

    Attributes:
        parameter: its name in the original model.
        initializer: the graph's tensor that stands for it; None: there is none.
        text: what differs.
        source: name of the parameter whose content it has; empty: it is no other's.
    """

    parameter: str
    initializer: str | None
    text: str
    source: str = ""

    @property
    def module(self) -> str:
        """Path of the module that owns it."""
        return self.parameter.rpartition(".")[0]

    def sentence(self) -> str:
        """Return the last part of the parameter's name, and what differs."""
        return f"{self.parameter.rpartition('.')[2]} {self.text}"


@dataclass
class WeightComparison:
    """All weights.

    Attributes:
        findings: of parameters that differ or are missing.
        by_initializer: name of the parameter that an initializer is equal to.
        names: of all parameters.
    """

    findings: list[WeightFinding] = field(default_factory=list)
    by_initializer: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def lacking_layer(self) -> str:
        """Return the path of the one layer none of whose weights is in the graph; empty if there is none."""
        lacking = {item.parameter for item in self.findings if item.initializer is None}
        layer = common_module([name.rpartition(".")[0] for name in lacking])
        whole = [name for name in self.names if name.startswith(f"{layer}.")]
        return layer if layer.rpartition(".")[2].isdecimal() and lacking.issuperset(whole) else ""

    def exchange(self, right: Mapping[str, str]) -> WeightComparison:
        """Return the comparison with some initializers that stand for other parameters than those they are equal to.

        Args:
            right: names of the parameters that they stand for.
        """
        kept = [item for item in self.findings if item.parameter not in right.values()]
        sources = [(name, parameter, self.by_initializer[name]) for name, parameter in right.items()]
        findings = [
            WeightFinding(parameter, name, f"is that of {source.rpartition('.')[0]}", source)
            for name, parameter, source in sources
        ]
        return WeightComparison([*findings, *kept], {**self.by_initializer, **right}, self.names)

    def of(self, module: str) -> list[WeightFinding]:
        """Return the findings of a module and of those below it."""
        return [
            finding for finding in self.findings if finding.module == module or finding.module.startswith(f"{module}.")
        ]


def compare_weights(
    module: Any,
    initializers: Mapping[str, Array],
    check: Callable[[], None] = lambda: None,
    nodes: Sequence[Any] = (),
    *,
    half: bool = False,
) -> WeightComparison:
    """Compare the parameters and buffers of a torch module with the initializers of a graph.

    Args:
        module: float32.
        initializers: by name.
        check: raises when the time is up.
        nodes: of the graph, which tell in what layout a square weight is read.
        half: initializers in float16 are right if they are the parameters rounded.
    """
    parameters = dict(_parameters(module))
    floats = {name: array for name, array in initializers.items() if array.dtype.kind == "f" and array.size >= MIN_SIZE}
    by_sum: dict[tuple[int, int], list[str]] = {}
    for name, array in floats.items():
        by_sum.setdefault(_sum_of_bits(array), []).append(name)
    result, open_parameters, used = WeightComparison(names=list(parameters)), list[str](), set[str]()
    for name, array in parameters.items():
        check()
        forms = [array, _in_half(array)] if half else [array]
        found = [
            other for form in forms for other in by_sum.get(_sum_of_bits(form), ()) if _is_same(form, floats[other])
        ]
        for initializer in found:
            result.by_initializer.setdefault(initializer, name)
        used.update(found)
        if not found:
            open_parameters.append(name)
    rest = {name: array for name, array in floats.items() if name not in used}
    for name in open_parameters:
        check()
        alone = sum(parameters[other].shape == parameters[name].shape for other in open_parameters) == 1
        partner = _partner(name, parameters[name], rest, alone=alone)
        if partner is None:
            result.findings.append(WeightFinding(name, None, "is not in the graph"))
            continue
        text = _describe(parameters[name], rest.pop(partner), half=half)
        result.by_initializer.setdefault(partner, name)
        if text:
            result.findings.append(WeightFinding(name, partner, text))
    for initializer in read_transposed(module, nodes, initializers, result.by_initializer):
        if not any(item.initializer == initializer for item in result.findings):
            result.findings.append(WeightFinding(result.by_initializer[initializer], initializer, TRANSPOSED))
    return result


def repairs(module: Any, initializers: Mapping[str, Array], comparison: WeightComparison) -> dict[str, Array]:
    """Return the right content of the initializers that differ, in the graph's shape and dtype; none if it is much.

    Args:
        module: the original model.
        initializers: of the graph.
        comparison: of both.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    right: dict[str, Array] = {}
    for finding in comparison.findings:
        if finding.initializer is None or finding.initializer not in initializers:
            continue
        held = initializers[finding.initializer]
        expected = np.squeeze(tensors[finding.parameter].detach().float().numpy())
        if finding.source:
            source = np.squeeze(tensors[finding.source].detach().float().numpy())
            expected = expected if np.array_equal(source, np.squeeze(held)) else expected.T
        elif finding.text == TRANSPOSED and expected.shape == np.squeeze(held).shape:
            expected = np.squeeze(held).T
        elif _is_turned(expected, np.squeeze(held)):
            expected = expected.T
        right[finding.initializer] = np.ascontiguousarray(expected.reshape(held.shape), dtype=held.dtype)
    return right if sum(array.nbytes for array in right.values()) <= MOST_REPAIRED else {}


def _parameters(module: Any) -> Iterator[tuple[str, Array]]:
    """Yield the floating parameters and buffers by name, but those of a pooler, which pooled models do not run."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() >= MIN_SIZE and UNUSED not in name.split("."):
            yield name, np.squeeze(tensor.detach().float().numpy())


def _bits(array: Array) -> Array:
    """Return the bits of an array in float32, without dims of 1."""
    return np.squeeze(np.asarray(array, dtype=np.float32)).view(np.uint32)


def _sum_of_bits(array: Array) -> tuple[int, int]:
    """Return the size of an array and the sum of its bits, which a transposed one has too."""
    return array.size, int(_bits(array).sum(dtype=np.uint64))


def _is_same(expected: Array, actual: Array) -> bool:
    """Return True for the same bits, in the same order or transposed."""
    left, right = _bits(expected), _bits(actual)
    return np.array_equal(left, right) or (left.ndim == 2 and np.array_equal(left.T, right))


def _partner(name: str, expected: Array, rest: Mapping[str, Array], *, alone: bool) -> str | None:
    """Return the tensor that stands for a parameter: by its name, else the most alike of its shape.

    Args:
        name: of the parameter.
        expected: its content.
        rest: tensors that are no other parameter's.
        alone: no other parameter of its shape is without a tensor, so that a single one must be its.
    """
    fitting = {
        other: np.squeeze(array)
        for other, array in rest.items()
        if np.squeeze(array).shape in (expected.shape, expected.shape[::-1])
    }
    named = [other for other in fitting if other == name or other.endswith(f".{name}")]
    if named:
        return named[0]
    if not fitting:
        return None
    if alone and len(fitting) == 1 and expected.ndim > 1:
        return next(iter(fitting))
    shares = {other: _likeness(expected, array) for other, array in fitting.items()}
    best = max(shares, key=lambda other: shares[other])
    if shares[best] >= ALIKE:
        return best
    empty = [other for other, array in fitting.items() if not array.any()]
    return empty[0] if empty else None


def _likeness(expected: Array, actual: Array) -> float:
    sides = [actual] if actual.shape == expected.shape else []
    sides += [actual.T] if actual.T.shape == expected.shape else []
    return max(_share(expected, side) for side in sides)


def _share(expected: Array, actual: Array) -> float:
    """Return the share of equal elements, or the cosine, whichever is greater."""
    norm = float(np.linalg.norm(expected) * np.linalg.norm(np.nan_to_num(actual)))
    cosine = abs(float(np.vdot(expected, np.nan_to_num(actual)))) / norm if norm else 0.0
    return max(float(np.mean(expected == actual)), cosine)


def _in_half(array: Array) -> Array:
    """Return an array rounded to fp16, in float32."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def _describe(expected: Array, actual: Array, *, half: bool = False) -> str:
    """Return what differs, with the tensor turned whichever way is more alike, or else in the way that has a name."""
    half = half and actual.dtype == np.float16
    actual = np.squeeze(np.asarray(actual, np.float32))
    turned = _is_turned(expected, actual)
    if half:
        expected = _in_half(expected)
        side: Any = actual.T if turned else actual
        if side.shape == expected.shape:
            expected = np.where(np.abs(expected - side) <= HALF_STEP, side, expected)
    text = difference(expected, actual.T if turned else actual)
    if not is_named(text) and actual.ndim == 2 and expected.shape == actual.shape == actual.shape[::-1]:
        other = difference(expected, actual if turned else actual.T)
        return other if is_named(other) else text
    return text


def copy_finding(module: Any, actual: Array, *, half: bool = False) -> str:
    """Return what differs in an initializer that stands for a module's weight beside a right one; empty if none does.

    A graph has several of a weight that several layers share, or that is folded where it is used.

    Args:
        module: that uses it.
        actual: its content.
        half: see `compare_weights`.
    """
    if actual.ndim == 1 and not actual.any() and getattr(module, "bias", None) is None:
        return ""  # an operator asks for a bias where the module has none
    for name, parameter in module.named_parameters():
        expected = np.squeeze(parameter.detach().float().numpy())
        if actual.size >= MIN_SIZE and np.squeeze(actual).shape in (expected.shape, expected.shape[::-1]):
            text = _describe(expected, actual, half=half)
            if is_named(text) or _likeness(expected, np.squeeze(actual)) >= ALIKE:
                return f"{name} {text}"
    return ""


def _is_turned(expected: Array, actual: Array) -> bool:
    """Return True if a tensor is more like the transposed one than like the expected one."""
    if actual.ndim != 2 or actual.shape[::-1] != expected.shape:
        return False
    return actual.shape != expected.shape or _share(expected, actual.T) > _share(expected, actual)


def used_weights(nodes: Sequence[Any], initializers: Mapping[str, Array], producer: Mapping[str, Any]) -> list[str]:
    """Return the names of the initializers that some nodes read, also through transpositions and reshapes."""
    found: dict[str, None] = {}
    for node in nodes:
        for name in node.input:
            source = name
            while source in producer and producer[source].op_type in ("Transpose", "Reshape", "Identity", "Cast"):
                source = producer[source].input[0]
            if source in initializers:
                found[source] = None
    return list(found)
