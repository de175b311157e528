# SPDX-License-Identifier: Apache-2.0
"""Explains one failing result: runs what stands between reference and runtime, and looks into the graph.

Only a few rows are run again. Nothing here judges: the verdict is what it was.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.errors import ValidateError
from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.attribution import OUTSIDE, Attribution, attribute
from qeff_validate.explain.block_program import program_error
from qeff_validate.explain.context import NOISE, Clock, ExplainContext, Subset
from qeff_validate.explain.failing_rows import batch_of, choose_rows, described
from qeff_validate.explain.inside_graph import InsideGraph, look_inside, overflow
from qeff_validate.explain.layers import FACTOR, Layers
from qeff_validate.explain.locate import Location
from qeff_validate.explain.outside import BESIDE, UNEXPLAINED, ReadingSession, outside_finding
from qeff_validate.explain.program_layers import ProgramLayers, ProgramLocation
from qeff_validate.explain.repro import Repro, write_repro
from qeff_validate.explain.smallest_block import Target, graph_error, graph_targets, smallest_block
from qeff_validate.explain.summary import short, short_text, summary, worst_layers
from qeff_validate.explain.wrong_feed import wrong_feed
from qeff_validate.protocols import Explained, Measured, Runtime, Session, Settings, capabilities
from qeff_validate.report.explanation import Explanation, ProgramSearch
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.parent import SharedChild
from qeff_validate.tensors import Array, Tensors


def explain(
    pipeline: Any,
    on: Runtime,
    result: Result,
    settings: Settings,
    *,
    limit_s: float = 60.0,
    repro: Path | None = None,
) -> Explanation:
    """Return where the error of a result comes from.

    Args:
        pipeline: of the case (`pipeline.case_pipeline.Pipeline`), just after `result` was made.
        on: the runtime of the result.
        result: of the case on the runtime, with metrics.
        settings: of other runtimes that are opened.
        limit_s: time limit; what is known when it has passed is returned.
        repro: folder for a bundle that shows the error by itself.

    Raises:
        ValidateError: something could not be built, loaded or run.
    """
    clock = Clock(limit_s, time.monotonic())
    with SharedChild() as shared:
        work = Explainer(ExplainContext(pipeline, on, result, settings, clock, shared), repro)
        try:
            work.run()
        except ValidateError as exc:  # such as a time limit, or no original model here
            if not work.known:
                raise
            work.unfinished = str(exc).splitlines()[0]
    return work.explanation()


class Explainer:
    """The steps of one explanation, and what is known after each."""

    def __init__(self, context: ExplainContext, repro: Path | None = None) -> None:
        self._context, self._folder = context, repro
        self._repro = Repro(None, "" if repro is None else "the error is not made in a graph")
        self.unfinished = ""
        self.attribution = Attribution()
        self._layers: Layers | None = None
        self._location = Location(None, "")
        self._rows: list[int] = []
        self._row = ""
        self._weights_seen = False
        self._search: ProgramSearch | None = None
        self._program: ProgramLocation | None = None

    @property
    def known(self) -> bool:
        """Whether the shares of the stages are known."""
        return bool(self.attribution.shares)

    def run(self) -> None:
        """Attribute the error to a stage, and look for the layer if it is made in the graph."""
        context = self._context
        pipeline, model = context.pipeline, context.model
        actual, reference = pipeline.actual, pipeline.reference()
        name = pipeline.graph().outputs[0].name
        if (
            not isinstance(model, Measured)
            or name not in actual
            or name not in reference
            or actual[name].shape != reference[name].shape
        ):
            return
        row, texts = choose_rows(context, reference[name], actual[name])
        revisits = revisits_finding(reference, actual, name)
        if revisits:
            self.attribution = Attribution((), OUTSIDE[context.on.kind == "qpc"])
            self._location = Location(None, revisits)
            return
        subset = self._attributed(name, texts)
        if self.attribution.stage in OUTSIDE:
            held = self._adapters_held()
            if held is None:
                self._look_outside(name)
            else:
                self._location = held
            if self._location.finding != BESIDE:
                return
            if context.on.kind == "qpc" and self._look_inside(subset, row):
                return
            # the file is wrong, but with these rows alone it is right: look at the row in its own batch
            subset = self._attributed(name, batch_of(context, texts[-1]))
            if self.attribution.stage in OUTSIDE:
                return
        self._look_inside(subset, row)

    def _attributed(self, name: str, texts: list[int]) -> Subset:
        """Attribute the error of some texts to a stage, and return them."""
        subset = self._context.subset(texts)
        self._rows = [int(place) for place in subset.rows]
        self.attribution = attribute(self._context, name, subset)
        self._context.clock.check()
        return subset

    # --- outside of the graph --------------------------------------------------------------

    def _look_outside(self, name: str) -> None:
        """Find what differs between the runtime's outputs and those that its file gives when it is run again."""
        context = self._context
        pipeline, model, actual = context.pipeline, context.model, context.pipeline.actual[name]

        def infer(session: Session) -> Array:
            return np.asarray(model.infer(session, pipeline.inputs(), pipeline.reference())[name])

        artifact = pipeline.artifact(context.on.kind, capabilities(context.on).sdk)
        with pipeline.opened(context.isolated(context.on.name), artifact) as session:
            expected = infer(session)
            self._location = Location(None, outside_finding(expected, actual, context.labels(len(expected))))
            if UNEXPLAINED in self._location.finding:  # it is kept if the time is up
                sizes = pipeline.graph().buckets[0]
                feed = wrong_feed(session, infer, actual, sizes, context.clock.check)
                self._location = Location(None, feed) if feed else self._location

    def _adapters_held(self) -> Location | None:
        """Return where the runtime holds other adapter tensors than it was fed; None if it holds them all."""
        context = self._context
        pipeline, model, inputs = context.pipeline, context.model, context.pipeline.inputs()
        adapters = getattr(inputs, "adapters", {})
        if not any(adapters.values()):
            return None
        artifact = pipeline.artifact(context.on.kind, capabilities(context.on).sdk)
        with pipeline.opened(context.on, artifact) as opened:
            session = ReadingSession(opened, adapters, half=str(context.result.precision).startswith("fp16"))
            model.infer(session, inputs, pipeline.reference())
        return session.location()

    # --- inside the graph ------------------------------------------------------------------

    def _look_inside(self, subset: Subset, row: int) -> bool:
        """Look into the graph and then into the program that is made of it; return whether a module is found."""
        context, stage = self._context, self.attribution.stage
        if not isinstance(context.model, Explained) or context.graph_artifact() is None:
            return False
        self._row = described(context, row)
        place = int(np.flatnonzero(subset.rows == row)[0])
        with look_inside(context, subset, place, stage, self._keep_weight) as inside:
            in_graph = inside.location.module is not None
            found = in_graph and stage not in OUTSIDE  # else the stage is wrong, and its own batch tells which is right
            if stage not in OUTSIDE:
                self._layers, self._location = inside.layers, inside.location
            if not in_graph and stage in ("precision", *OUTSIDE):
                if stage == "precision":
                    self._location = overflow(inside.recorded, inside.original.tokens)
                found = self._look_inside_program(inside, subset, row)
            if self._folder is not None and (found or stage not in OUTSIDE):
                self._write_repro(self._folder, inside, subset, row)
        return found

    def _keep_weight(self, location: Location) -> None:
        """Keep a weight that differs, for an explanation that ends early."""
        if self.attribution.stage == "export":
            self._location, self._weights_seen = location, True

    def _look_inside_program(self, inside: InsideGraph, subset: Subset, row: int) -> bool:
        sdk = capabilities(self._context.on).sdk
        if self._context.on.kind != "qpc" or sdk is None:
            return False
        program = ProgramLayers(self._context, inside, subset, row, sdk)
        try:
            found = program.find()
        finally:
            self._search = program.search
        if found is None:
            return False
        self._program = found
        self._layers, self._location = found.layers, found.location
        self.attribution = replace(self.attribution, stage=found.stage)
        return True

    def _write_repro(self, folder: Path, inside: InsideGraph, subset: Subset, row: int) -> None:
        context, sdk = self._context, None
        targets, error = graph_targets(inside), partial(graph_error, inside.graph)
        if self._program is not None:
            program, sdk = self._program, capabilities(context.on).sdk
            assert sdk is not None
            bound = FACTOR[context.pipeline.case.precision.compute] * program.layers.floor
            targets, error = [Target(program.place, bound, program.cuts)], partial(program_error, context, sdk=sdk)
        shown = smallest_block(context, inside, subset, row, targets, error)
        self._repro = (
            Repro(None, "no part of the graph shows the error by itself")
            if shown is None
            else write_repro(context, shown, folder, self._summary(), self.attribution.stage, sdk)
        )

    # --- the result ------------------------------------------------------------------------

    def _summary(self) -> str:
        in_graph = self._layers is not None or self._weights_seen
        return summary(self.attribution.stage, self._location, in_graph=in_graph, unfinished=self.unfinished)

    def explanation(self) -> Explanation:
        """Return what is known."""
        stage, location, layers = self.attribution.stage, self._location, self._layers
        return Explanation(
            summary=self._summary(),
            stages=self.attribution.shares,
            stage=stage,
            layers=() if layers is None else worst_layers(layers.errors),
            module=None if location.module is None else short(location.module),
            finding=short_text(location.finding),
            rows=tuple(self._rows),
            seconds=round(self._context.clock.seconds, 2),
            row=self._row,
            program=self._search,
            repro=None if self._repro.folder is None else str(self._repro.folder),
            repro_note=self._repro.text,
        )


def revisits_finding(reference: Tensors, actual: Tensors, name: str) -> str:
    """Return what is wrong if an output is right and only a repetition of its first rows is not; else empty."""
    if relative_error(reference[name], actual[name]) > NOISE["fp16"]:
        return ""
    for other in actual.keys() - reference.keys():
        first = actual[name][: len(actual[other])]
        if first.shape == actual[other].shape and not np.array_equal(first, actual[other]):
            return "a second visit gives other values than the first: state is left over from what ran between"
    return ""
