# SPDX-License-Identifier: Apache-2.0
"""From a divergent layer and a comparison of weights to one module, and what differs inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qeff_validate.explain.arrays import of_tokens, relative_error
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.layers import LEAST, Layers
from qeff_validate.explain.names import common_module, is_within, numbered
from qeff_validate.explain.operators import READS, operator_finding, output_of_zeros
from qeff_validate.explain.outputs import output_finding
from qeff_validate.explain.reference_values import Call, ReferenceValues
from qeff_validate.explain.structure import SUM, left_out_finding, repeated_layer, sum_finding, swapped_finding
from qeff_validate.explain.weights import WeightComparison, WeightFinding, copy_finding, used_weights
from qeff_validate.models.emulation.precision import Compute
from qeff_validate.protocols import OriginalRun

NEARBY = 40
"""Values before a divergent one that are tried as its input."""

AFTER = 8
"""Values behind it that are tried: what a parent computes later may stand where it is read."""

MANY = 3
"""Findings of weights that are told one by one; more are told as a number."""


@dataclass(frozen=True, slots=True)
class Location:
    """The module that differs, and what differs there."""

    module: str | None
    finding: str


def locate(
    original: OriginalRun,
    recorded: ReferenceValues,
    graph: GraphValues,
    layers: Layers,
    weights: WeightComparison,
    compute: Compute = "fp32",
) -> Location:
    """Return the module and the finding.

    Args:
        original: the run of the original model.
        recorded: its values.
        graph: the graph.
        layers: the local errors.
        weights: the comparison of weights.
        compute: what the graph computes in.
    """
    location = _locate(original, recorded, graph, layers, weights, compute)
    if location.module is None or (location.finding and SUM not in location.finding):
        return location
    moved = layers.moved()
    other = None if moved is None else _locate(original, recorded, graph, moved, weights, compute)
    return location if other is None or not other.finding or SUM in other.finding else other


def _locate(
    original: OriginalRun,
    recorded: ReferenceValues,
    graph: GraphValues,
    layers: Layers,
    weights: WeightComparison,
    compute: Compute,
) -> Location:
    if layers.guilty is None:
        return Location(None, "")
    module = layers.module or ""
    lacking, repeated = weights.lacking_layer(), repeated_layer(recorded, graph, weights)
    if lacking:
        return Location(lacking, f"is not in the graph{f': {repeated} runs in its place' if repeated else ''}")
    if repeated:
        return Location(repeated, "runs twice")
    absent = [item for item in weights.of(module) if item.initializer is None] if layers.missing else []
    if absent:
        owner = common_module([item.module for item in absent])
        if owner and {item.parameter for item in absent}.issuperset(
            name for name in weights.names if is_within(name, owner)
        ):
            return Location(owner, "is not in the graph")
        return Location(module, f"{len(absent)} of its weights are not in the graph")
    # a weight that differs inside the module says most
    own = [item for item in weights.of(module) if item.initializer is not None] if module else []
    if own:
        return _of_weights(own, weights)
    owned = dict(original.module.named_modules()).get(module)  # None of what is no module, such as a pooling
    learned = {name for name, _ in original.module.named_parameters()}  # buffers are used by many modules
    nodes = graph.block(layers.matches.names[layers.guilty], set(layers.matches.names.values()))
    for name in used_weights(nodes, graph.weights, graph.producer):
        differing = [item for item in weights.findings if item.initializer == name]
        if differing:
            return _of_weights(differing, weights)
        parameter = weights.by_initializer.get(name)
        text = "" if parameter or owned is None else copy_finding(owned, graph.weights[name], half=compute == "fp16")
        if text:
            return Location(module, text)
        owner = parameter.rpartition(".")[0] if parameter is not None else module
        beside = module, layers.values[layers.guilty].module  # of missing modules the block goes on to the next value's
        if parameter in learned and not any(is_within(owner, path) or is_within(path, owner) for path in beside):
            return _of_another(module, owner, graph, weights)
    location = computed_location(original, recorded, layers, compute)
    return location if location.finding else Location(module, _softmax_finding(nodes, layers))


def _softmax_finding(nodes: Sequence[Any], layers: Layers) -> str:
    """Return the axis of a softmax that does not run over the last one; empty if there is none."""
    for node in nodes:
        axis = next((item.i for item in node.attribute if item.name == "axis"), -1)
        output = layers.matches.inherited.get(node.output[0])
        if node.op_type == "Softmax" and output is not None and axis not in (-1, output.ndim - 1):
            return f"its softmax runs over axis {axis}, not the last"
    return ""


def computed_location(
    original: OriginalRun, recorded: ReferenceValues, layers: Layers, compute: Compute = "fp32"
) -> Location:
    """Return what the block of the divergent value computes in place of its module; no finding if it is not known.

    Args:
        original: the run of the original model.
        recorded: its values.
        layers: the local errors, one of which is guilty.
        compute: what the block computes in.
    """
    assert layers.guilty is not None
    module = layers.module or ""
    value = layers.values[layers.guilty]
    observed = layers.matches.local[layers.guilty]
    observed = observed.reshape(value.array.shape) if observed.size == value.array.size else observed
    tokens = original.tokens

    def size(expected: Any, actual: Any) -> float:
        return relative_error(of_tokens(expected, tokens), of_tokens(actual, tokens))

    tolerance = max(5 * LEAST[compute], 2 * layers.floor)
    root = original.module
    if value.output:
        text = _candidate(original, value.output, observed, tolerance)
        if not text and observed.shape == value.array.shape:
            text = output_finding(value.array, observed, None, size, tolerance)
        return Location(module, text or _of_another_value(layers, observed, size, tolerance))
    text, place = "", value.place
    if place is not None and observed.shape == value.array.shape:
        around = layers.values[max(0, layers.guilty - NEARBY) : layers.guilty]
        around = [*layers.values[layers.guilty + 1 : layers.guilty + AFTER], *around]
        others = [(item.module, item.array) for item in around if item.place is not None]

        def computed(path: str, call: Call | None) -> str:
            beside = "" if is_within(place[0], path) else common_module([path, place[0]])
            outer = recorded.call(beside, place) if beside else None
            parent = None if outer is None else (beside, outer)
            found = call and operator_finding(root, place, path, call, observed, size, tolerance, others, parent)
            return found or ""

        call = recorded.call(module, place)
        text = computed(module, call)
        given: Any = None if call is None or not call[0] else call[0][0]
        given = given.numpy() if given is not None and hasattr(given, "numpy") and given.is_floating_point() else None
        summed = "" if text else sum_finding(layers.values, layers.guilty, observed, size, tolerance)
        if summed:  # its terms are the original's, so nothing that is missing before it is to blame
            return Location(value.module, summed)
        text = text or output_finding(value.array, observed, given, size, tolerance)
        if not text or text.startswith(READS):
            for finding in (swapped_finding, left_out_finding):
                path, other = finding(root, recorded, layers, observed, size, tolerance)
                if path:
                    return Location(path, other)
        # an operator that does the work of several modules holds nothing of what the first of them give
        for path in dict.fromkeys([value.module, *layers.missing]) if not text else ():
            other = computed(path, recorded.call(path, place)) if path != module else ""
            if other:
                return Location(path, other)
    if not text and layers.missing and value.place is not None and value.place[0] == value.module:
        call = recorded.call(value.module, value.place)
        zeros = None if call is None else output_of_zeros(root, value.module, value.place, call)
        if zeros is not None and zeros.shape == observed.shape and size(zeros, observed) <= tolerance:
            return Location(module, "its output is zero")
    return Location(module, text or _of_another_value(layers, observed, size, tolerance))


def _of_another_value(layers: Layers, observed: Any, size: Callable[[Any, Any], float], tolerance: float) -> str:
    """Return which other value of the original model a block gives; empty if it gives none."""
    assert layers.guilty is not None
    own = layers.values[layers.guilty]
    for other in layers.values:
        if other is not own and other.array.shape == observed.shape and size(other.array, observed) <= tolerance:
            return (
                f"its output is {'another one of its own' if other.module == own.module else f'that of {other.module}'}"
            )
    return ""


def _of_weights(own: Sequence[WeightFinding], weights: WeightComparison) -> Location:
    """Return the module of some weights; if many weights differ alike, what these have in common."""
    alike = [item for item in weights.findings if item.text == own[0].text]
    common = common_module([item.module for item in alike])
    if len(alike) <= MANY:
        return Location(own[0].module, _told([item.sentence() for item in own if item.module == own[0].module]))
    return Location(common if numbered(common) else own[0].module, f"{len(alike)} weights {own[0].text}")


def _of_another(module: str, owner: str, graph: GraphValues, weights: WeightComparison) -> Location:
    """Return where the weights of another module are used: in one module, or in a whole layer."""
    here, there = module.split("."), owner.split(".")
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), len(here))
    if at < len(here) and at < len(there) and here[at].isdecimal() and there[at].isdecimal():
        own, other = (".".join(path[: at + 1]) for path in (here, there))
        order = [
            weights.by_initializer.get(name, "") for name in used_weights(graph.nodes, graph.weights, graph.producer)
        ]
        first = [place for place, name in enumerate(order) if is_within(name, other)]
        second = [place for place, name in enumerate(order) if is_within(name, own)]
        if first and second and max(first) < min(second):
            return Location(own, f"weights are those of {other}: the layers are swapped")
    return Location(module, f"weight is that of {owner}")


def _candidate(original: OriginalRun, output: str, observed: Any, tolerance: float) -> str:
    """Return which other computation of an output's inputs gives what the graph gives; empty if none does."""
    for name, outputs in original.candidates().items():
        if output in outputs and relative_error(outputs[output], observed) <= tolerance:
            return name
    return ""


def _told(texts: Sequence[str]) -> str:
    shown = ", ".join(texts[:MANY])
    return shown if len(texts) <= MANY else f"{shown} and {len(texts) - MANY} more"
