# SPDX-License-Identifier: Apache-2.0
"""Values inside a compiled program: its graph is compiled again with some of them as outputs, or as inputs.

A card shows nothing but outputs. Compiled programs come from the store. The original model's run gives the feeds, so
that each value stands beside the original's; a language model runs chunk by chunk and step by step, as its decode loop
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from qeff_validate.artifact import Artifact
from qeff_validate.builders.compile_qpc import compile_key, compile_qpc
from qeff_validate.builders.source_keys import code_key
from qeff_validate.errors import RunError
from qeff_validate.explain.context import ExplainContext
from qeff_validate.explain.graph_values import CUT, GraphValues
from qeff_validate.protocols import OriginalRun, Session
from qeff_validate.sdk.locate import Sdk
from qeff_validate.tensors import RETAINED, Array, Tensors


class ProgramValues:
    """A compiled graph whose inner values can be read and replaced.

    Args:
        context: of a runtime that opens compiled programs.
        graph: that the program is compiled from.
        original: the run that it is compared with; of a model without state in the sizes of the program.
        sdk: whose compiler and bindings are asked.
        like: values that may be asked for, by name, whose first two dims are those of the tokens; dtypes and other dims
            matter.
    """

    def __init__(
        self, context: ExplainContext, graph: GraphValues, original: OriginalRun, sdk: Sdk, like: Tensors
    ) -> None:
        self._context, self._graph, self._original, self._sdk, self._like = context, graph, original, sdk, like
        self.compilations = 0
        """Programs that were asked for beside that of the case; those of the store count too."""

    def _symbols(self) -> list[Any]:
        """Return the first two dims of ``input_ids``: symbols or numbers."""
        names = self._context.pipeline.case.artifacts.inputs
        value = next(v for v in self._graph.model.graph.input if v.name == names.get("input_ids", "input_ids"))
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    def run(self, names: Sequence[str] = (), cuts: Tensors | None = None) -> dict[str, Array]:
        """Run the program once over the texts.

        Args:
            names: values to return; none: the program of the case as it is.
            cuts: content of values that the nodes behind them read instead, ``[batch, seq_len, …]``.

        Returns:
            The values, and all outputs of the graph by its own names, in the shapes of the original run's.

        Raises:
            ValidateError: the compiler or the runtime refuses the graph.
        """
        context, cuts = self._context, cuts or {}
        artifact = self._compiled(sorted(names), cuts) if names or cuts else context.pipeline.qpc(self._sdk)
        context.clock.check()
        with context.isolated(context.on.name).open(artifact) as session:
            if any(spec.name.endswith(RETAINED) for spec in session.outputs):
                return self._by_steps(session, names, cuts)
            specs = {spec.name: spec.dtype for spec in session.inputs}
            feeds = {**self._feeds(), **{name + CUT: array for name, array in cuts.items()}}
            fed = {name: np.ascontiguousarray(feeds[name].astype(dtype)) for name, dtype in specs.items()}
            return dict(session.run(fed))

    def _feeds(self) -> dict[str, Array]:
        names = self._context.pipeline.case.artifacts.inputs
        return {names.get(name, name): array for name, array in self._original.feeds.items()}

    # --- compilation -----------------------------------------------------------------------

    def _compiled(self, names: Sequence[str], cuts: Tensors) -> Artifact:
        pipeline = self._context.pipeline
        case, buckets, source = pipeline.case, pipeline.graph().buckets, pipeline.onnx()
        self.compilations += 1

        def make(folder: Path) -> None:
            outputs = [self._info(name) for name in names]
            inputs = [self._info(name, CUT) for name in sorted(cuts)]
            compile_qpc(
                self._graph.saved(outputs, inputs),
                folder,
                sdk=self._sdk,
                options=case.compile,
                precision=case.precision,
                buckets=buckets,
                on_line=pipeline.progress.line,
            )

        key = {
            "onnx": source.digest,
            "outputs": list(names),
            "cuts": sorted(cuts),
            "compile": compile_key(case.compile, case.precision, buckets, self._sdk),
            "code": code_key(),
        }
        entry = pipeline.store.entry("qpc", key, make)
        return Artifact("qpc", entry.path / "qpc", entry.digest, entry.provenance)

    def _info(self, name: str, end: str = "") -> Any:
        like = self._like[name]
        kind = helper.np_dtype_to_tensor_dtype(like.dtype)
        return helper.make_tensor_value_info(name + end, kind, [*self._symbols(), *like.shape[2:]])

    # --- language models -------------------------------------------------------------------

    def _by_steps(self, session: Session, names: Sequence[str], cuts: Tensors) -> dict[str, Array]:
        """Run the prompt in chunks and the continuation token by token; the first row of a batch is the text."""
        total = self._original.feeds["input_ids"].shape[1]
        values: dict[str, Array] = {}
        outputs: dict[str, Array] = {}
        given = self._context.pipeline.case.artifacts.inputs
        retained = {spec.name for spec in session.outputs if spec.name.endswith(RETAINED)}
        state = {
            given.get(name, name): array
            for name, array in self._original.feeds.items()
            if f"{name}{RETAINED}" in retained and not name.startswith("past_")
        }
        spans = list(self._spans(session, total))
        for start, end, (batch, width) in spans:
            feeds = {**self._chunk(start, end, batch, width), **state}
            for name, array in cuts.items():
                feeds[name + CUT] = np.zeros((batch, width, *array.shape[2:]), array.dtype)
                feeds[name + CUT][0, : end - start] = array[0, start:end]
            specs = {spec.name: spec.dtype for spec in session.inputs}
            unknown = sorted(feeds.keys() - specs.keys())
            if unknown:
                raise RunError(f"the program has no input {', '.join(unknown[:4])}")
            fed = {name: np.ascontiguousarray(array.astype(specs[name])) for name, array in feeds.items()}
            last = end == total
            fetch = [spec.name for spec in session.outputs if spec.name not in retained or last]
            outputs = dict(session.run(fed, fetch=fetch))
            state = {}
            for name in names:
                value = values.setdefault(name, np.zeros((1, total, *outputs[name].shape[2:]), np.float32))
                value[0, start:end] = outputs[name][0, : end - start]
        return {**{name: array[:1] for name, array in outputs.items()}, **values}

    def _spans(self, session: Session, total: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Yield first and last place of each run, and the rows and places of its shape."""
        ids = self._context.pipeline.case.artifacts.inputs.get("input_ids", "input_ids")
        allowed = sorted({(shapes[ids][0], shapes[ids][1]) for shapes in session.shapes}, key=lambda shape: shape[1])
        if not allowed:
            raise RunError("the program names no shapes of its inputs")
        prompt, at = total - self._original.steps, 0
        while at < total:
            most = allowed[-1][1] if at < prompt else 1
            end = min(at + most, prompt if at < prompt else total)
            yield at, end, next(shape for shape in allowed if shape[1] >= end - at)
            at = end

    def _chunk(self, start: int, end: int, batch: int, width: int) -> dict[str, Array]:
        given = self._context.pipeline.case.artifacts.inputs
        original = self._original.feeds
        ids = np.zeros((batch, width), np.int64)
        places = np.full((batch, width), -1, np.int64)
        ids[0, : end - start] = original["input_ids"][0, start:end]
        places[0, : end - start] = original["position_ids"][0, start:end]
        feeds: dict[str, Array] = {"input_ids": ids, "position_ids": places}
        if "adapter_ids" in original:
            feeds["adapter_ids"] = np.resize(original["adapter_ids"], batch)
        return {given.get(name, name): array for name, array in feeds.items()}
