# SPDX-License-Identifier: Apache-2.0
"""The first layer of a compiled program that diverges, by bisection over layer boundaries.

Where the graph is right and its program is not, a few boundaries between layers become outputs, and the first one whose
error is above what the original model has there in the precision ends the search. Then the modules of the layers
between become outputs, and at last inputs too, so that each shows the error that it makes by itself. Keys and values
are outputs already, so a language model needs no bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qeff_validate.explain.arrays import of_tokens, relative_error
from qeff_validate.explain.context import ExplainContext, Subset
from qeff_validate.explain.failing_rows import text_of_row
from qeff_validate.explain.inside_graph import InsideGraph, own_feeds
from qeff_validate.explain.layers import FACTOR, LEAST, Layers, first_divergent
from qeff_validate.explain.locate import Location, computed_location
from qeff_validate.explain.matching import Matches
from qeff_validate.explain.names import numbered
from qeff_validate.explain.program_finding import ROUNDING, columns_finding, rounding_finding
from qeff_validate.explain.program_values import ProgramValues
from qeff_validate.explain.reference_values import inherited_errors, local_errors, record
from qeff_validate.explain.summary import short
from qeff_validate.protocols import OriginalRun
from qeff_validate.report.explanation import BoundaryError, LayerError, ProgramSearch
from qeff_validate.sdk.locate import Sdk
from qeff_validate.tensors import RETAINED, Array, Tensors, retained

CUTS = 3
"""Boundaries that become outputs in one compilation."""

WIDEST = 2
"""Layers in which modules are looked at; bisection goes on above."""

INHERITED = 3.0
"""Multiple of the error that the original model has at a boundary in the precision, from which one counts."""


@dataclass(frozen=True, slots=True)
class ProgramLocation:
    """Where a program diverges.

    Attributes:
        layers: local errors of the program.
        location: the module, and what differs there.
        stage: ``precision`` if the rounding that was asked for makes the error, else ``compiler and runtime``.
        place: of the value, as `reference_values` knows it, or the name of an output.
        cuts: names of the values that were the original's.
    """

    layers: Layers
    location: Location
    stage: str
    place: Any
    cuts: frozenset[str]


class ProgramLayers:
    """The search in one compiled program.

    Args:
        context: of a runtime that opens compiled programs, and a result that fails.
        inside: its graph beside the original model.
        subset: the texts.
        row: index of the failing row in an output of the case.
        sdk: whose compiler and bindings are asked.
    """

    def __init__(self, context: ExplainContext, inside: InsideGraph, subset: Subset, row: int, sdk: Sdk) -> None:
        self._context, self._inside = context, inside
        self._compute = context.pipeline.case.precision.compute
        self._original = self._run_of(subset, row)
        self._recorded = record(self._original)
        self._by_place = {value.place or value.output: value for value in self._recorded.values}
        tokens = inside.original.tokens
        like = {
            name: array
            for name, array in inside.layers.matches.inherited.items()
            if array.shape[:2] == tokens.shape and array.ndim > 2
        }
        self._program = ProgramValues(context, inside.graph, self._original, sdk, like)
        values, self._names = inside.layers.values, dict[Any, str]()
        for index, name in inside.layers.matches.names.items():
            place = values[index].place or values[index].output
            if place in self._by_place and (name in like or values[index].output):
                self._names[place] = name
        self._expected: dict[Any, float] = {}
        self._boundary_errors: list[BoundaryError] = []
        self._observer = float("nan")

    @property
    def search(self) -> ProgramSearch:
        """What is known of the search."""
        return ProgramSearch(self._program.compilations, self._observer, tuple(self._boundary_errors))

    def _run_of(self, subset: Subset, row: int) -> OriginalRun:
        """Return the original model's run in the sizes of the program."""
        context, graph = self._context, self._context.pipeline.graph()
        if retained(graph.inputs, graph.outputs):
            return self._inside.original
        for texts in (subset, context.subset([text_of_row(context, row)])):
            rows, longest = len(texts.inputs.ids), max(ids.size for ids in texts.inputs.ids)
            fitting = [sizes for sizes in graph.buckets if sizes["seq_len"] >= longest and sizes["batch_size"] >= rows]
            if fitting:
                break
        sizes = min(fitting, key=lambda sizes: sizes["seq_len"], default=self._inside.graph.sizes())
        place = int(np.flatnonzero(texts.rows == row)[0])
        return context.original_run(texts, sizes, place)

    def _size(self, expected: Any, actual: Any) -> float:
        tokens = self._original.tokens
        actual = np.asarray(actual)
        if actual.shape != expected.shape and actual.size == expected.size:
            actual = actual.reshape(expected.shape)
        return relative_error(of_tokens(expected, tokens), of_tokens(actual, tokens))

    def _least(self, error: float) -> float:
        """Return what rounding makes; where the original model overflows in the precision, that is no measure."""
        return max(LEAST[self._compute], error) if np.isfinite(error) else LEAST[self._compute]

    def find(self) -> ProgramLocation | None:
        """Return where the program diverges; None if no module stands out.

        Raises:
            ValidateError: the compiler or the runtime refuses a graph, or the time is up.
        """
        values = self._recorded.values
        compressed = self._context.pipeline.case.precision.weights is not None
        errors = inherited_errors(self._original, values, self._compute, self._size, compressed=compressed)
        for value, error in zip(values, errors, strict=True):
            self._expected[value.place or value.output] = self._least(error)
        before = self._program.run()
        boundaries = self._boundaries()
        low, high = self._narrowed(before, boundaries)
        low, high = self._bisected(boundaries, low, high)
        region = self._region(boundaries, low, high)
        observed = self._program.run([self._names[place] for place in region if place not in self._outputs()])
        self._note(region[-1:], observed)
        self._told(before, observed)
        return self._diverging(region, boundaries[low] if low >= 0 else None, observed)

    # --- where ------------------------------------------------------------------------------

    def _order(self, place: Any) -> int:
        return self._inside.graph.index[self._names[place]]

    def _outputs(self) -> set[Any]:
        return {place for place, name in self._names.items() if name in self._inside.graph.outputs}

    def _boundaries(self) -> list[Any]:
        """Return the last value before the first layer, and the last of each layer, in the order of the graph."""
        inner = sorted(self._names.keys() - self._outputs(), key=self._order)
        last: dict[str, Any] = {}
        for place in inner:
            last[numbered(self._by_place[place].module)] = place
        first = next((at for at, place in enumerate(inner) if numbered(self._by_place[place].module)), len(inner))
        last.pop("", None)
        layers = sorted(last.values(), key=self._order)
        return [*(inner[first - 1 : first] if first else []), *layers]

    def _narrowed(self, outputs: Tensors, boundaries: Sequence[Any]) -> tuple[int, int]:
        """Return the boundaries between which keys and values begin to differ; all of them if there are none."""
        tokens = self._original.tokens.shape[1]
        states = [place for place in self._names if self._by_place[place].is_state]
        if not states or self._context.pipeline.case.precision.kv is not None:
            return -1, len(boundaries)
        good = -1
        for place in sorted(states, key=self._order):
            expected = self._by_place[place].array[:, :, :tokens]
            error = self._size(expected, outputs[self._names[place]][:, :, :tokens])
            self._add(place, error)
            before = [at for at, boundary in enumerate(boundaries) if self._order(boundary) < self._order(place)]
            if not error <= INHERITED * self._expected[place]:
                layer = numbered(self._by_place[place].module)
                ends = [at for at, item in enumerate(boundaries) if numbered(self._by_place[item].module) == layer]
                return good, (ends or [len(boundaries)])[0]
            good = max([good, *before])  # keys and values are computed from the boundary before them
        return good, len(boundaries)

    def _bisected(self, boundaries: Sequence[Any], low: int, high: int) -> tuple[int, int]:
        while high - low > WIDEST:
            self._context.clock.check()
            count = min(CUTS, high - low - 1)
            chosen = sorted({low + round((high - low) * step / (count + 1)) for step in range(1, count + 1)})
            chosen = [at for at in chosen if low < at < high]
            observed = self._program.run([self._names[boundaries[at]] for at in chosen])
            self._note([boundaries[at] for at in chosen], observed)
            bad = next((at for at in chosen if self._is_bad(boundaries[at], observed)), None)
            if bad is None:
                low = chosen[-1]
            else:
                low, high = max([low, *(at for at in chosen if at < bad)]), bad
        return low, high

    def _is_bad(self, place: Any, observed: Tensors) -> bool:
        error = self._size(self._by_place[place].array, observed[self._names[place]])
        return not error <= INHERITED * self._expected[place]

    def _region(self, boundaries: Sequence[Any], low: int, high: int) -> list[Any]:
        """Return the values behind one boundary up to another, or to the end."""
        start = self._order(boundaries[low]) if low >= 0 else -1
        end = self._order(boundaries[high]) if high < len(boundaries) else len(self._inside.graph.nodes)
        places = [place for place in self._names if start < self._order(place) <= end]
        return sorted(places, key=self._order)

    def _note(self, places: Sequence[Any], observed: Tensors) -> None:
        known = {item.module for item in self._boundary_errors}
        for place in places:
            value = self._by_place[place]
            if not value.is_state and short(value.module) not in known:
                self._add(place, self._size(self._by_place[place].array, observed[self._names[place]]))

    def _add(self, place: Any, error: float) -> None:
        value = self._by_place[place]
        name = value.output.removesuffix(RETAINED) or short(value.module)
        self._boundary_errors.append(BoundaryError(name, error, self._expected[place]))

    def _told(self, before: Tensors, observed: Tensors) -> None:
        """Keep how far the outputs of the program move when inner values become outputs too."""
        name = next(name for name in self._inside.graph.outputs if not name.endswith(RETAINED))
        error = relative_error(before[name], observed[name])
        same = np.array_equal(before[name], observed[name], equal_nan=True)
        self._observer = 0.0 if same else error

    # --- what -------------------------------------------------------------------------------

    def _diverging(self, region: Sequence[Any], start: Any, observed: Tensors) -> ProgramLocation | None:
        """Return the first module of a region whose own error stands out, on the original's values."""
        inner = [place for place in region if place not in self._outputs()]
        cut = [*([start] if start is not None else []), *inner]
        cuts = {self._names[place]: self._content(place) for place in cut}
        local = self._program.run([self._names[place] for place in inner], cuts)
        values = list(self._recorded.values)
        index = {value.place or value.output: at for at, value in enumerate(values)}
        floors = local_errors(self._original, values, self._compute, self._size)
        known = {index[place]: self._names[place] for place in (*cut, *region)}
        matches = Matches(names=known, inherited=dict(observed))
        errors, ratios, order = [], [], []
        for place in region:
            at = index[place]
            value, name = values[at], self._names[place]
            if value.is_state:
                continue
            floor = self._least(floors[at])
            matches.local[at] = local[name]
            error = LayerError(
                value.module,
                *self._inside.graph.operator(name),
                self._size(value.array, observed[name]),
                self._size(value.array, local[name]),
                floor,
            )
            errors.append(error)
            ratios.append(error.local / floor)
            order.append(at)
        guilty = first_divergent(ratios, FACTOR[self._compute])
        layers = Layers(values, matches, errors, None if guilty is None else order[guilty], ())
        if guilty is None:
            return None
        layers = replace(layers, floor=errors[guilty].floor)
        place = next(place for place in region if index[place] == order[guilty])
        return self._located(layers, place, local[self._names[place]], errors[guilty].local, cuts)

    def _located(self, layers: Layers, place: Any, observed: Array, error: float, cuts: Tensors) -> ProgramLocation:
        """Tell the rounding that was asked for from a defect, and what the defect is."""
        name, expected, tokens = self._names[place], self._by_place[place].array, self._original.tokens
        stops = {other: array for other, array in cuts.items() if other != name}
        rounding, made = rounding_finding(
            self._context,
            self._inside.graph,
            name,
            observed,
            {**own_feeds(self._context, self._original), **stops},
            lambda array: self._size(expected, array),
        )
        if made >= ROUNDING * error or not np.isfinite(made):
            return ProgramLocation(layers, Location(layers.module, rounding), "precision", place, frozenset(cuts))
        location = computed_location(self._original, self._recorded, layers, self._compute)
        finding = location.finding
        if not finding and expected.shape[:2] == tokens.shape and observed.size == expected.size:
            finding = columns_finding(expected[tokens], observed.reshape(expected.shape)[tokens])
        return ProgramLocation(
            layers, replace(location, finding=finding), "compiler and runtime", place, frozenset(cuts)
        )

    def _content(self, place: Any) -> Array:
        array = np.nan_to_num(self._by_place[place].array)
        like = self._inside.layers.matches.inherited[self._names[place]]
        content: Array = array.reshape(*array.shape[:2], *like.shape[2:]).astype(like.dtype)
        return content
