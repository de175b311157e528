# SPDX-License-Identifier: Apache-2.0
"""Somebody else's graph behind our names: the interface is checked first, with both sides listed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from qeff_validate.config.case import Artifacts
from qeff_validate.errors import RunError
from qeff_validate.protocols import Graph, Session
from qeff_validate.tensors import RETAINED, Shapes, Tensors, TensorSpec, retained

INTEGERS, HALVES = frozenset({"int64", "int32"}), frozenset({"float32", "float16"})


class Foreign:
    """A session on a user's artifact, under the names of the model's graph interface.

    Args:
        session: the open session.
        graph: the interface that the model feeds and reads.
        artifacts: the user's mapping of names. With ``outputs``, outputs that it does not name are not fetched.

    Raises:
        RunError: names, ranks or dtypes do not fit; the message lists both sides.
    """

    def __init__(self, session: Session, graph: Graph, artifacts: Artifacts) -> None:
        self._session = session
        self._inputs = dict(artifacts.inputs)
        self._outputs = dict(artifacts.outputs)
        ours_in = {theirs: ours for ours, theirs in self._inputs.items()}
        ours_out = {theirs: ours for ours, theirs in self._outputs.items()}
        self.inputs = _renamed(session.inputs, ours_in)
        self.outputs = _renamed([s for s in session.outputs if not ours_out or s.name in ours_out], ours_out)
        wide = {spec.name: spec.dtype for spec in graph.outputs if not spec.name.endswith(RETAINED)}
        self._widened = {
            spec.name: wide[spec.name]
            for spec in self.outputs
            if spec.name in wide and spec.dtype != wide[spec.name] and {spec.dtype, wide[spec.name]} <= HALVES
        }
        both = {**ours_in, **ours_out}
        self.shapes: tuple[Shapes, ...] = tuple(
            {both.get(name, name): dims for name, dims in shapes.items()} for shapes in session.shapes
        )
        state = retained(graph.inputs, graph.outputs)
        problems = _problems("input", self.inputs, graph.inputs, state)
        problems += _problems("output", self.outputs, graph.outputs, state)
        if problems:
            raise RunError(
                f"the artifact does not fit the model: {'; '.join(problems)}\n"
                f"  it has    {_listed(session.inputs)} -> {_listed(session.outputs)}\n"
                f"  wanted is {_listed(graph.inputs)} -> {_listed(graph.outputs)}\n"
                "  other names can be mapped: artifacts: {inputs: {input_ids: THEIRS}, outputs: {output: THEIRS}}"
            )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run under the file's names and return outputs under ours."""
        names = [spec.name for spec in self.outputs] if fetch is None else list(fetch)
        theirs = {self._outputs.get(name, name): name for name in names}
        given = {self._inputs.get(name, name): array for name, array in feeds.items()}
        found = self._session.run(given, fetch=list(theirs))
        outputs = {theirs[name]: array for name, array in found.items()}
        # half precision fits into float32, so nothing is lost; state goes back as it came
        return {
            name: array.astype(self._widened[name]) if name in self._widened else array
            for name, array in outputs.items()
        }

    def reset(self) -> None:
        """Forget retained state."""
        self._session.reset()


def _renamed(specs: Sequence[TensorSpec], names: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in specs)


def _problems(what: str, got: Sequence[TensorSpec], wanted: Sequence[TensorSpec], state: Collection[str]) -> list[str]:
    known, given = {spec.name: spec for spec in wanted}, {spec.name: spec for spec in got}
    problems = [f"{what} {name!r} is missing" for name in known if name not in given]
    problems += [f"{what} {name!r} is unknown" for name in given if name not in known]
    for name in known.keys() & given.keys():
        spec, other = known[name], given[name]
        # ids and masks may be int32, as some exporters make them; state on a card is half precision, and so are outputs
        # of a graph that computes in it; anything else changes what is fed or read
        free = HALVES if what == "output" or name.removesuffix(RETAINED) in state else INTEGERS
        if spec.dtype != other.dtype and not {spec.dtype, other.dtype} <= free:
            problems.append(f"{what} {name!r} has dtype {other.dtype}, wanted {spec.dtype}")
        if len(spec.shape) != len(other.shape):
            problems.append(f"{what} {name!r} has {len(other.shape)} dims, wanted {len(spec.shape)}")
    return problems


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "(" + ", ".join(map(str, specs)) + ")"
