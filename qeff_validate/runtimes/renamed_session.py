# SPDX-License-Identifier: Apache-2.0
"""A session on a user's graph under the names of the model's graph interface."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from qeff_validate.config.case import Artifacts
from qeff_validate.errors import RunError
from qeff_validate.protocols import Graph, Session
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import RETAINED, Tensors, TensorSpec, retained

INTEGERS, FLOATS = frozenset({"int64", "int32"}), frozenset({"float32", "float16"})


class RenamedSession(SessionWrapper):
    """A session on a user's artifact, under the names of the model's graph interface.

    Outputs other than retained state are returned in the dtype of the interface: float16 becomes float32.

    Args:
        session: the open session.
        graph: the interface that the model feeds and reads.
        artifacts: the user's mapping of names. With ``outputs``, outputs that it does not name are not fetched.

    Raises:
        RunError: names, ranks or dtypes do not fit; the message lists both sides.
    """

    def __init__(self, session: Session, graph: Graph, artifacts: Artifacts) -> None:
        super().__init__(session)
        self._input_names = dict(artifacts.inputs)
        self._output_names = dict(artifacts.outputs)
        ours_by_input = {theirs: ours for ours, theirs in self._input_names.items()}
        ours_by_output = {theirs: ours for ours, theirs in self._output_names.items()}
        mapped = [spec for spec in session.outputs if not ours_by_output or spec.name in ours_by_output]
        self.inputs, self.outputs = _renamed(session.inputs, ours_by_input), _renamed(mapped, ours_by_output)
        ours_by_name = {**ours_by_input, **ours_by_output}
        self.shapes = tuple(
            {ours_by_name.get(name, name): dims for name, dims in shapes.items()} for shapes in session.shapes
        )
        dtypes = {spec.name: spec.dtype for spec in graph.outputs if not spec.name.endswith(RETAINED)}
        self._converted = {
            spec.name: dtypes[spec.name]
            for spec in self.outputs
            if spec.name in dtypes and spec.dtype != dtypes[spec.name] and {spec.dtype, dtypes[spec.name]} <= FLOATS
        }
        state = retained(graph.inputs, graph.outputs)
        problems = _problems("input", self.inputs, graph.inputs, state)
        problems += _problems("output", self.outputs, graph.outputs, state)
        missing = {spec.name for spec in graph.outputs} - {spec.name for spec in self.outputs}
        problems += [why for name, why in graph.why.items() if name in missing]
        if problems:
            raise RunError(
                f"the artifact does not fit the model: {'; '.join(problems)}\n"
                f"  it has    {_listed(session.inputs)} -> {_listed(session.outputs)}\n"
                f"  wanted is {_listed(graph.inputs)} -> {_listed(graph.outputs)}\n"
                "  other names can be mapped: artifacts: {inputs: {input_ids: THEIRS}, outputs: {output: THEIRS}}"
            )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run under the artifact's names; feeds and outputs have the names of the interface.

        Raises:
            RunError: as in the wrapped session.
        """
        names = [spec.name for spec in self.outputs] if fetch is None else list(fetch)
        ours = {self._output_names.get(name, name): name for name in names}
        renamed_feeds = {self._input_names.get(name, name): array for name, array in feeds.items()}
        outputs = self.session.run(renamed_feeds, fetch=list(ours))
        arrays = {ours[name]: array for name, array in outputs.items()}
        # float16 fits into float32, so nothing is lost; retained state keeps its dtype, as it is fed back
        return {
            name: array.astype(self._converted[name]) if name in self._converted else array
            for name, array in arrays.items()
        }


def _renamed(specs: Sequence[TensorSpec], names: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in specs)


def _problems(
    side: str, actual: Sequence[TensorSpec], expected: Sequence[TensorSpec], state: Collection[str]
) -> list[str]:
    """Return the differences between a graph's inputs or outputs and those of the interface.

    Args:
        side: ``input`` or ``output``.
        actual: of the graph.
        expected: of the interface.
        state: names of retained state.
    """
    theirs, ours = {spec.name: spec for spec in actual}, {spec.name: spec for spec in expected}
    problems = [f"{side} {name!r} is missing" for name in ours if name not in theirs]
    problems += [f"{side} {name!r} is unknown" for name in theirs if name not in ours]
    for name in ours.keys() & theirs.keys():
        spec, other = ours[name], theirs[name]
        # ids and masks may be int32, as some exporters write them; state on a card is float16, and so are outputs of a
        # graph that computes in it; any other difference changes what is fed or read
        interchangeable = FLOATS if side == "output" or name.removesuffix(RETAINED) in state else INTEGERS
        if spec.dtype != other.dtype and not {spec.dtype, other.dtype} <= interchangeable:
            problems.append(f"{side} {name!r} has dtype {other.dtype}, wanted {spec.dtype}")
        if len(spec.shape) != len(other.shape):
            problems.append(f"{side} {name!r} has {len(other.shape)} dims, wanted {len(spec.shape)}")
    return problems


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "(" + ", ".join(map(str, specs)) + ")"
