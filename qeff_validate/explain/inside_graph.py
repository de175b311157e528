# SPDX-License-Identifier: Apache-2.0
"""Looks into an ONNX graph for the module of the original model whose own error stands above its floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.explain.arrays import of_tokens, relative_error
from qeff_validate.explain.context import ExplainContext, Subset
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.layers import Layers, find_layers
from qeff_validate.explain.locate import MANY, Location, locate
from qeff_validate.explain.matching import EQUAL
from qeff_validate.explain.range_audit import FP16_MAX
from qeff_validate.explain.reference_values import ReferenceValues, record
from qeff_validate.explain.weight_layout import exchanged
from qeff_validate.explain.weights import WeightComparison, compare_weights, repairs
from qeff_validate.files import temporary_folder
from qeff_validate.protocols import OriginalRun
from qeff_validate.tensors import Array, Tensors


@dataclass(frozen=True, slots=True)
class InsideGraph:
    """A graph beside the original model, on a few texts.

    Attributes:
        graph: open for runs as long as the context that made this.
        original: the run of the original model.
        recorded: its values.
        feeds: of the graph, by its own names.
        layers: the local errors.
        location: the module, and what differs there.
    """

    graph: GraphValues
    original: OriginalRun
    recorded: ReferenceValues
    feeds: Tensors
    layers: Layers
    location: Location


@contextmanager
def look_inside(
    context: ExplainContext,
    subset: Subset,
    row: int,
    stage: str | None,
    early: Callable[[Location], None] = lambda _: None,
) -> Iterator[InsideGraph]:
    """Match the values of the original model with those of the graph, and find the first that diverges.

    Args:
        context: of a runtime that opens a graph or what is made of one, and a model with `protocols.Explained`.
        subset: the texts.
        row: the failing one among the rows of the subset.
        stage: the guilty one; the graph runs with the optimizer if that is it.
        early: called with the first weight that differs, before anything is run, in case the time is up meanwhile.

    Raises:
        IncomparableError: the texts do not fit into the graph's fixed sizes.
        ValidateError: the graph cannot be run, or the time is up.
    """
    check = context.clock.check
    artifact = context.graph_artifact()
    assert artifact is not None
    assert artifact.path is not None
    optimized = replace(context.settings, packed_weights=False)  # a copy of all weights for one run
    settings = optimized if stage == "optimizer" else context.unoptimized
    with temporary_folder() as folder:
        opened = context.isolated("ort", settings).open
        graph = GraphValues(Path(artifact.path), folder, opened, untrusted=artifact.untrusted)
        check()
        original = context.original_run(subset, graph.sizes(), row)
        check()
        feeds = own_feeds(context, original)
        fed = {name: array for name, array in feeds.items() if array.dtype.kind == "f"}
        compute = context.pipeline.file_precision("onnx").compute
        held = {**graph.weights, **fed}
        weights = compare_weights(original.module, held, check, graph.nodes, half=compute == "fp16")
        differing = [item for item in weights.findings if item.initializer is not None]
        if differing:
            early(Location(differing[0].module, differing[0].sentence()))
        graph.repairs = repairs(original.module, graph.weights, weights)
        recorded = record(original)
        check()
        weights = with_exchanged(weights, original, recorded, graph, feeds)
        layers = find_layers(original, recorded, graph, feeds, compute, check)
        location = locate(original, recorded, graph, layers, weights, compute)
        yield InsideGraph(graph, original, recorded, feeds, layers, location)


def with_exchanged(
    weights: WeightComparison, original: OriginalRun, recorded: ReferenceValues, graph: GraphValues, feeds: Tensors
) -> WeightComparison:
    """Return a comparison that tells which layers have each other's weights, if that makes the graph right.

    Args:
        weights: the comparison by content.
        original: the run of the original model.
        recorded: its values.
        graph: the graph, whose repairs are those of the comparison; they become those of the returned one.
        feeds: of the graph, by its own names.
    """
    right = exchanged(
        original.module, weights.names, recorded.calls, graph.nodes, graph.weights, weights.by_initializer
    )
    outputs = {
        value.output: value.array for value in recorded.values if value.output in graph.outputs and not value.is_state
    }
    if not 0 < len(right) <= MANY or not outputs:
        return weights

    def error() -> float:
        actual = graph.run(feeds, list(outputs), repaired=True)
        return max(relative_error(expected, actual[name]) for name, expected in outputs.items())

    before, other = graph.repairs, weights.exchange(right)
    wrong = error()
    graph.repairs = repairs(original.module, graph.weights, other)
    if error() < min(EQUAL, wrong / 10):
        return other
    graph.repairs = before
    return weights


def own_feeds(context: ExplainContext, original: OriginalRun) -> dict[str, Array]:
    """Return the feeds of a run by the names that the graph has for them."""
    names: Any = context.pipeline.case.artifacts
    return {names.inputs.get(name, name): array for name, array in original.feeds.items()}


def overflow(recorded: ReferenceValues, tokens: Array) -> Location:
    """Return the first module whose values are beyond the range of fp16, with the greatest; none if all fit."""
    for value in recorded.values:
        most = float(np.abs(of_tokens(value.array, tokens)).max())
        if most > FP16_MAX:
            return Location(value.module, overflow_text(most))
    return Location(None, "")


def overflow_text(greatest: float) -> str:
    """Return the finding for values beyond the range of fp16."""
    return f"values up to {greatest:.4g} overflow fp16 (65504)"
