# SPDX-License-Identifier: Apache-2.0
"""The smallest part of a graph, on the fewest and shortest rows, that still shows an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qeff_validate.errors import ValidateError
from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.block import Block, block_model, sources, with_used_rows
from qeff_validate.explain.context import NOISE, ExplainContext, Subset
from qeff_validate.explain.failing_rows import text_of_row
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.inside_graph import InsideGraph, own_feeds
from qeff_validate.explain.layers import FACTOR
from qeff_validate.explain.reference_values import ReferenceValue, record
from qeff_validate.protocols import OriginalRun
from qeff_validate.tensors import Array, Tensors

SHORTER = 2
"""Texts that are shorter than the failing one and are tried before it."""


@dataclass(frozen=True, slots=True)
class ShownError:
    """An error that a block shows.

    Attributes:
        block: the part of the graph.
        error: relative L2 of its output against the original model.
        bound: what rounding may make there.
    """

    block: Block
    error: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Run:
    """The original model on the rows of a candidate."""

    original: OriginalRun
    values: dict[Any, ReferenceValue]
    feeds: Tensors
    rows: int


@dataclass(frozen=True, slots=True)
class Target:
    """A value whose block is to show an error.

    Attributes:
        place: of the value, as `reference_values` knows it, or the name of an output.
        bound: relative L2 that rounding may make there.
        stops: values of the graph at which the block may begin; none: it is the graph from its inputs on.
    """

    place: Any
    bound: float
    stops: frozenset[str] = frozenset()


def graph_targets(inside: InsideGraph) -> list[Target]:
    """Return the guilty value of a graph, and its first output with all that leads to it."""
    layers, targets = inside.layers, []
    if layers.guilty is not None:
        value = layers.values[layers.guilty]
        stops = frozenset(layers.matches.names.values())
        targets.append(Target(value.place or value.output, FACTOR["fp32"] * layers.floor, stops))
    outputs = [value.output for value in layers.values if value.output in inside.graph.outputs and not value.is_state]
    return [*targets, *(Target(output, NOISE["fp32"]) for output in outputs[:1])]


def smallest_block(
    context: ExplainContext,
    inside: InsideGraph,
    subset: Subset,
    row: int,
    targets: Sequence[Target],
    error: Callable[[Block], float],
) -> ShownError | None:
    """Return the first block that shows the error: of the fewest rows, the shortest, and the smallest part.

    Each target is tried on shorter texts alone, on the failing one alone, and on the rows of the explanation.

    Args:
        context: the explanation.
        inside: the graph.
        subset: the texts of the explanation.
        row: index of the failing row in an output of the case.
        targets: the smallest first.
        error: runs a block, and returns the relative L2 error of its output; see `graph_error`.
    """
    runs = _Runs(context, inside, subset, row)
    for target in targets:
        for run in runs:
            context.clock.check()
            block = _block(inside, run, target)
            if block is not None and not error(block) <= target.bound:
                small = with_used_rows(inside.graph, block)
                return ShownError(small, error(small), target.bound)
    return None


class _Runs:
    """The candidates' runs, made when they are first asked for."""

    def __init__(self, context: ExplainContext, inside: InsideGraph, subset: Subset, row: int) -> None:
        self._context, self._inside, self._subset, self._row = context, inside, subset, row
        self._made: list[_Run] = []

    def __iter__(self) -> Iterator[_Run]:
        yield from list(self._made)
        for place, rows in enumerate(self._candidates()):
            if place >= len(self._made):
                run = self._run(rows)
                if run is not None:
                    self._made.append(run)
                    yield run

    def _candidates(self) -> list[int | None]:
        """Return rows of an output whose text is run alone, and None for the texts of the explanation together."""
        context = self._context
        ids = context.pipeline.inputs().ids
        rows = range(len(context.pipeline.actual[context.pipeline.graph().outputs[0].name]))
        first: dict[int, int] = {}
        for row in sorted(rows, key=lambda row: abs(row - self._row)):  # those of the same adapter are near
            first.setdefault(text_of_row(context, row), row)
        length = ids[text_of_row(context, self._row)].size
        shorter = sorted((text for text in first if 0 < ids[text].size < length), key=lambda text: ids[text].size)
        return [*(first[text] for text in shorter[:SHORTER]), self._row, None]

    def _run(self, row: int | None) -> _Run | None:
        context, inside = self._context, self._inside
        if row is None:
            return _Run(inside.original, _by_place(inside.layers.values), inside.feeds, len(inside.original.tokens))
        alone = context.subset([text_of_row(context, row)])
        try:
            place = int(np.flatnonzero(alone.rows == row)[0])
            original = context.original_run(alone, inside.graph.sizes(), place)
        except ValidateError:  # such as a graph whose sizes are fixed
            return None
        values = record(original).values
        return _Run(original, _by_place(values), own_feeds(context, original), len(original.tokens))


def _by_place(values: Sequence[ReferenceValue]) -> dict[Any, ReferenceValue]:
    return {value.place or value.output: value for value in values}


def _block(inside: InsideGraph, run: _Run, target: Target) -> Block | None:
    """Return the block of a value; None if the run has no content for what it reads."""
    graph, known = inside.graph, inside.layers
    places = {other: known.values[at].place or known.values[at].output for at, other in known.matches.names.items()}
    name = next((other for other, place in places.items() if place == target.place), target.place)
    value = run.values.get(target.place)
    if value is None or name not in graph.index:
        return None
    cuts = {other for other, place in places.items() if place in run.values} & target.stops - {name, *graph.outputs}
    if target.stops and not cuts:  # of another adapter, whose modules have other paths
        return None
    needed = sources(graph, name, cuts)
    like = graph.run(run.feeds, [*sorted(needed & cuts), name])
    inputs: dict[str, Array] = {other: run.feeds[other] for other in needed if other in run.feeds}
    for other in sorted(needed & cuts):
        content = run.values[places[other]].array
        if content.size != like[other].size:
            return None
        inputs[other] = content.astype(like[other].dtype).reshape(like[other].shape)
    if needed - inputs.keys():
        return None
    model = block_model(graph, name, inputs, like[name])
    return Block(model, inputs, name, value.array, _mask(value.array, run.original.tokens), run.rows, _length(run))


def _length(run: _Run) -> int:
    return int(run.original.tokens.shape[1])


def _mask(array: Any, tokens: Array) -> Array | None:
    """Return the mask of an array's leading dims that hold tokens; None if all of it counts."""
    if tokens.all():
        return None
    if array.shape[:2] == tokens.shape:
        return tokens
    return tokens.ravel() if array.shape[:1] == (tokens.size,) else None


def graph_error(graph: GraphValues, block: Block) -> float:
    """Return the relative L2 error of a block's output, run as the graph is."""
    return block_error(block, graph.run_model(block.model, block.inputs, [block.output])[block.output])


def block_error(block: Block, actual: Array) -> float:
    """Return the relative L2 error of what a block's output holds."""
    expected = block.expected
    if actual.size != expected.size:
        return float("inf")
    actual = actual.reshape(expected.shape)
    if block.tokens is not None:
        expected, actual = expected[block.tokens], actual[block.tokens]
    return relative_error(expected, actual)
