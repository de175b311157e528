# SPDX-License-Identifier: Apache-2.0
"""The first layer that diverges: the error that each block of a graph makes on the reference's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qeff_validate.explain.arrays import of_tokens, relative_error
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.matching import Matcher, Matches
from qeff_validate.explain.names import common_module, numbered
from qeff_validate.explain.reference_values import ReferenceValue, ReferenceValues, local_errors
from qeff_validate.models.emulation.precision import Compute
from qeff_validate.protocols import OriginalRun
from qeff_validate.report.explanation import LayerError
from qeff_validate.tensors import Array, Tensors

LEAST: Mapping[str, float] = {"fp32": 2e-7, "fp16": 3e-4, "bf16": 2.5e-3}
"""Relative L2 that no value is expected to stay below: a few units in the last place."""

FACTOR: Mapping[str, float] = {"fp32": 8.0, "fp16": 6.0, "bf16": 6.0}
"""Multiple of its floor from which a local error counts; legitimate graphs reach 1 (docs/power.md)."""

NEAR_WORST = 0.05
"""Part of the greatest ratio from which an earlier value counts as divergent too."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The local errors of a graph.

    Attributes:
        values: of the original model.
        matches: values of the graph that stand for them.
        errors: in the order of the graph.
        guilty: index of the first divergent value among ``values``; None: none diverges.
        missing: paths of the modules between the guilty value and those before it that the graph lacks.
        floor: of the guilty value.
        moved: returns the layers with a value before the guilty one moved behind nodes that change it (see
            `Matcher.moved_behind`); None if that explains nothing.
        uncut: returns the values of a module where nothing in it is the reference's (see `Matcher.uncut`).
    """

    values: Sequence[ReferenceValue]
    matches: Matches
    errors: Sequence[LayerError]
    guilty: int | None
    missing: Sequence[str]
    floor: float = 0.0
    moved: Callable[[], Layers | None] = lambda: None
    uncut: Callable[[str], Mapping[int, Array]] = lambda _: {}

    @property
    def module(self) -> str | None:
        """Path of the divergent module: of several that are missing, what they have in common."""
        if self.guilty is None:
            return None
        own = self.values[self.guilty].module
        if not self.missing:
            return own
        common = common_module(self.missing)
        # a chain of layers that cannot be told apart: it begins in the first of them
        return common if numbered(common) else numbered(self.missing[0]) or common or own


def find_layers(
    original: OriginalRun,
    recorded: ReferenceValues,
    graph: GraphValues,
    feeds: Tensors,
    compute: Compute = "fp32",
    check: Callable[[], None] = lambda: None,
) -> Layers:
    """Match the values of the original model with those of a graph, and measure the error that each block makes.

    Args:
        original: the run of the original model.
        recorded: its values.
        graph: the graph.
        feeds: its inputs, by its own names.
        compute: what the graph computes in.
        check: raises when the time is up.
    """
    values, tokens = recorded.values, original.tokens

    def size(expected: Any, actual: Any) -> float:
        return relative_error(of_tokens(expected, tokens), of_tokens(np.asarray(actual), tokens))

    matcher = Matcher(graph, feeds, values, tokens, check)
    matches = matcher.match()
    check()
    floors = local_errors(original, values, compute, size)

    def measured(matches: Matches) -> Layers:
        return _measured(original, values, matches, graph, floors, compute)

    layers = measured(matches)
    refined = None if layers.guilty is None else matcher.refined(matches, layers.guilty)
    if refined is not None:
        matches, layers = refined, measured(refined)

    def moved() -> Layers | None:
        other = None if layers.guilty is None else matcher.moved_behind(matches, layers.guilty)
        return None if other is None else measured(other)

    return replace(layers, moved=moved, uncut=lambda module: matcher.uncut(matches, module))


def _measured(
    original: OriginalRun,
    values: Sequence[ReferenceValue],
    matches: Matches,
    graph: GraphValues,
    floors: Sequence[float],
    compute: Compute,
) -> Layers:
    def size(expected: Any, actual: Any) -> float:
        return relative_error(of_tokens(expected, original.tokens), of_tokens(np.asarray(actual), original.tokens))

    order = sorted(matches.local, key=lambda index: graph.index[matches.names[index]])
    errors, ratios = [], []
    for index in order:
        name, value = matches.names[index], values[index]
        floor = max(LEAST[compute], np.nan_to_num(floors[index], nan=0.0))
        local = size(value.array, _like(matches.local[index], value.array))
        inherited = size(value.array, _like(matches.inherited[name], value.array))
        errors.append(LayerError(value.module, *graph.operator(name), inherited, local, floor))
        ratios.append(local / floor)
    # keys and values differ behind any fault of their attention, which its own values tell more of
    beside = [0.0 if values[index].is_state else ratio for index, ratio in zip(order, ratios, strict=True)]
    guilty = first_divergent(beside, FACTOR[compute])
    guilty = first_divergent(ratios, FACTOR[compute]) if guilty is None else guilty
    if guilty is None:
        return Layers(values, matches, errors, None, ())
    index = order[guilty]
    return Layers(values, matches, errors, index, _missing(values, matches, index), errors[guilty].floor)


def _like(actual: Array, expected: Any) -> Array:
    return actual.reshape(expected.shape) if actual.size == expected.size else actual


def first_divergent(ratios: Sequence[float], factor: float) -> int | None:
    """Return the index of the first ratio that is beyond the factor and near the greatest; NaN is beyond everything."""
    ratios = [np.inf if np.isnan(ratio) else ratio for ratio in ratios]
    if not ratios or not max(ratios) > factor:
        return None
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    greatest = max(ratios) if len(finite) < len(ratios) else max(finite)
    threshold = factor if np.isinf(greatest) else max(factor, NEAR_WORST * greatest)
    return next(place for place, ratio in enumerate(ratios) if ratio > threshold)


def _missing(values: Sequence[ReferenceValue], matches: Matches, guilty: int) -> list[str]:
    """Return the modules of the values before the guilty one, back to the last that the graph has."""
    paths = []
    for index in range(guilty - 1, -1, -1):
        if index in matches.names:
            break
        paths.append(values[index].module)
    return paths[::-1]
