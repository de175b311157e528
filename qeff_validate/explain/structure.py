# SPDX-License-Identifier: Apache-2.0
"""What a graph does between modules: sums with other terms, modules that are left out, layers that run twice."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.graph_values import GraphValues, reads
from qeff_validate.explain.layers import Layers
from qeff_validate.explain.linear import is_linear
from qeff_validate.explain.names import common_module, is_within, numbered
from qeff_validate.explain.operators import swapped_layers
from qeff_validate.explain.reference_values import ReferenceValue, ReferenceValues
from qeff_validate.explain.samples import sampled
from qeff_validate.explain.tried_module import TriedModule, changed
from qeff_validate.explain.weights import WeightComparison
from qeff_validate.models.emulation.ensemble import attention_implementation

TERMS = 12
"""Values before a sum that are tried as its terms, the nearest."""

MOST_LEFT_OUT = 8
"""Modules that are tried without."""

EXACT = 1e-9
"""Relative L2 of a sum in float64."""

SUM = " the sum"
"""Part of each finding about the terms of a sum; a term that is changed for all its readers explains as much."""

Size = Callable[[Any, Any], float]


def sum_finding(values: Sequence[ReferenceValue], guilty: int, observed: Any, size: Size, tolerance: float) -> str:
    """Return which terms a sum has more, less or not at all; empty if the value is no sum, or that is not it.

    Args:
        values: of the original model.
        guilty: index of the sum.
        observed: what the graph gives there.
        size: of an error.
        tolerance: error up to which an explanation holds.
    """
    expected = values[guilty].array
    before = [item for item in values[:guilty] if item.place is not None and item.array.shape == expected.shape]
    before = before[-TERMS:]
    parts, total = [sampled(item.array) for item in before], sampled(expected)
    for count in (2, 3):
        for chosen in itertools.combinations(range(len(before)), count):
            terms, right = [before[at] for at in chosen], np.ones(count)
            own = count == 2 and all(is_within(term.module, values[guilty].module) for term in terms)
            if own:  # an adapter scales what it adds to its layer
                right = np.linalg.lstsq(np.stack([parts[at] for at in chosen], axis=1), total, rcond=None)[0]
            if not right.all() or relative_error(total, right @ np.stack([parts[at] for at in chosen])) > EXACT:
                continue
            columns = np.stack([term.array.ravel() for term in terms], axis=1)
            weights = np.linalg.lstsq(columns, np.nan_to_num(observed).ravel(), rcond=None)[0]
            if size((columns @ weights).reshape(expected.shape), observed) > tolerance:
                continue
            shares = zip(weights / right, terms, strict=True)
            off = [(float(share), term) for share, term in shares if abs(share - 1) > 1e-3]
            of_adapter = any(term.module.endswith(".base_layer") for term in terms)
            residual = None if of_adapter or count > 2 else terms[0]
            return ", ".join(_term(share, term, first=term is residual) for share, term in off)
    return ""


def _term(weight: float, term: ReferenceValue, *, first: bool) -> str:
    """Return how often a term of a sum is added; the first that was computed is the residual."""
    what = f"{'the residual, ' if first else ''}what {term.module} gives"
    return f"{what}, is {'left out of' if abs(weight) < 1e-3 else f'scaled by {weight:.4g} in'}{SUM}"


def left_out_finding(
    root: Any, recorded: ReferenceValues, layers: Layers, observed: Any, size: Size, tolerance: float
) -> tuple[str, str]:
    """Return the module without which the original model gives what the graph does, and a text; empty if none is it.

    Args:
        root: the original model.
        recorded: its values.
        layers: the local errors; modules that the graph lacks are tried.
        observed: what the graph gives at the guilty value.
        size: of an error.
        tolerance: error up to which a hypothesis holds.
    """
    assert layers.guilty is not None
    value = layers.values[layers.guilty]
    if value.place is None:
        return "", ""
    for path in list(dict.fromkeys([*layers.missing, value.module]))[:MOST_LEFT_OUT]:
        parent = common_module([path.rpartition(".")[0], value.place[0].rpartition(".")[0]])
        call = recorded.call(parent, value.place) if parent else None
        if call is not None:
            output = _without(root, path, TriedModule(root.get_submodule(parent), call, parent, value.place))
            if output is not None and output.shape == observed.shape and size(output, observed) <= tolerance:
                return path, "is skipped: its output is its input"
    return "", ""


def _without(root: Any, path: str, parent: TriedModule) -> Any:
    """Return what a parent gives without a module below it; None if that module cannot be left out."""
    with attention_implementation(root, "eager"):
        copied = copy.deepcopy(parent.module).double()
    child = copied.get_submodule(path.removeprefix(f"{parent.path}."))
    try:
        with torch.no_grad(), changed(child, "forward", lambda states, *_, **__: states):
            return TriedModule(copied, parent.call, parent.path, parent.place).run()
    except Exception:  # it takes or gives something else
        return None


def swapped_finding(
    root: Any, recorded: ReferenceValues, layers: Layers, observed: Any, size: Size, tolerance: float
) -> tuple[str, str]:
    """Return the parent of a divergent module of which two linear layers are swapped, and a text; empty if none are.

    What the parent gives is looked at, as each of its layers gives what the other should.
    """
    assert layers.guilty is not None
    own = layers.module or ""
    for parent in (own, own.rpartition(".")[0]):
        shapes = Counter(tuple(child.weight.shape) for child in _linear_children(root, parent))
        if layers.values[layers.guilty].place is not None and max(shapes.values(), default=0) > 1:
            values = {layers.guilty: observed, **layers.uncut(parent)}
            text = _swapped(root, recorded, layers.values[max(values)], parent, values[max(values)], size, tolerance)
            if text:
                return parent, text
    return "", ""


def _swapped(
    root: Any, recorded: ReferenceValues, last: ReferenceValue, parent: str, given: Any, size: Size, tolerance: float
) -> str:
    """Return which two layers of a parent are swapped, by its last value; empty if none are."""
    call = None if last.place is None else recorded.call(parent, last.place)
    if call is None or last.place is None or given.size != last.array.size:
        return ""
    given = np.asarray(given, np.float64).reshape(last.array.shape)
    with attention_implementation(root, "eager"):
        tried = TriedModule(copy.deepcopy(root.get_submodule(parent)).double(), call, parent, last.place)
    try:
        with torch.no_grad():
            outputs = swapped_layers(tried)
            return next((text for text, output in outputs if size(output, given) <= tolerance), "")
    except Exception:  # layers of one shape that cannot stand in each other's place
        return ""


def _linear_children(root: Any, path: str) -> list[Any]:
    known = path and dict(root.named_modules()).get(path)  # a pooling is no module
    return [child for child in known.children() if is_linear(child)] if known else []


def repeated_layer(recorded: ReferenceValues, graph: GraphValues, weights: WeightComparison) -> str:
    """Return the path of the one layer all of whose weights are used twice, though it runs once; empty without one."""
    reading, uses = Counter(name for node in graph.nodes for name in reads(node)), Counter[str]()
    for initializer, parameter in weights.by_initializer.items():
        array = graph.weights.get(initializer)
        if array is not None and array.ndim == 2 and len(recorded.calls.get(parameter.rpartition(".")[0], ())) == 1:
            uses[parameter] += _uses(graph, initializer, reading)  # a graph may hold a copy for each use
    seen: dict[str, set[bool]] = {}
    for parameter, count in uses.items():
        seen.setdefault(numbered(parameter), set()).add(count > 1)
    twice = [layer for layer, repeated in seen.items() if layer and repeated == {True}]
    return twice[0] if len(twice) == 1 and {False} in seen.values() else ""


def _uses(graph: GraphValues, initializer: str, counts: Counter[str]) -> int:
    """Return how many nodes read an initializer, also behind a transposition."""
    turned = [node.output[0] for node in graph.nodes if node.op_type == "Transpose" and node.input[0] == initializer]
    return counts[initializer] - len(turned) + sum(counts[name] for name in turned)
