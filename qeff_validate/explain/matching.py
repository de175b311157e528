# SPDX-License-Identifier: Apache-2.0
"""Finds the values of the original model in a graph by their content, whatever the graph calls them.

Values before a fault are equal, so they are found at once. Each one that is found is cut, which gives the blocks behind
it the reference's inputs, so that values behind a fault are equal too in the next run. A value that stays different is
the output of the faulty block: of the values of its shape, the one that lets the most others be found stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.reference_values import ReferenceValue
from qeff_validate.tensors import Array, Tensors

EQUAL = 2e-3
"""Relative L2 below which a value of the graph is taken for one of the original model."""

SAMPLED = 2048
"""Elements of a value that are compared first."""

TRIED = 4
"""Values of the graph that are tried for one value of the original model that none is equal to."""

MOST_RUNS = 16
"""Runs of the graph with cuts; each opens a session."""


def relative_error(expected: Any, actual: Any) -> float:
    """Return the relative L2 difference; infinity if a value is not finite, or the shapes differ."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected.size != actual.size or not np.isfinite(actual).all():
        return float("inf")
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(expected.ravel() - actual.ravel()))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def of_tokens(array: Any, tokens: Array) -> Any:
    """Return the parts of a value that belong to tokens, ``[tokens, …]``; all of it if it has no such dims."""
    if array.shape[:2] == tokens.shape:
        return array[tokens]
    if array.shape[:1] == (tokens.size,):
        return array[tokens.ravel()]
    return array


def sampled(array: Any) -> Any:
    """Return about `SAMPLED` elements of an array, as a copy; the same places of arrays of one size."""
    return array.ravel()[:: max(1, array.size // SAMPLED)].copy()


@dataclass
class Matches:
    """Which value of a graph stands for which value of the original model.

    Attributes:
        names: of the graph, by the index of the reference value.
        local: the value where everything before it is the reference's, by the same index.
        missing: indices of the reference values that no value of the graph stands for.
        inherited: every value of the uncut graph.
    """

    names: dict[int, str] = field(default_factory=dict)
    local: dict[int, Array] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    inherited: dict[str, Array] = field(default_factory=dict)


class Matcher:
    """Matches the values of one run.

    Args:
        graph: the graph.
        feeds: its inputs, by its own names.
        values: of the original model.
        tokens: bool ``[batch, seq_len]``.
        check: called before each run; raises when the time is up.
    """

    def __init__(
        self,
        graph: GraphValues,
        feeds: Tensors,
        values: Sequence[ReferenceValue],
        tokens: Array,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._graph, self._feeds, self._values, self._tokens, self._check = graph, feeds, values, tokens, check
        self._runs = 0
        self._last: dict[str, Array] = {}
        self._expected = [of_tokens(value.array, tokens) for value in values]
        self._scopes = module_scopes(graph.nodes)
        self._sampled: Mapping[str, Array] = {}
        self._samples: dict[str, Array] = {}

    def match(self) -> Matches:
        """Return the matches."""
        found = Matches()
        found.inherited = self._run({})
        # with the right weights, values behind wrong ones are found at once; the names are the same
        current = self._run({}, repaired=True) if self._graph.repairs else found.inherited
        for index, value in enumerate(self._values):
            if value.output in self._graph.index:
                found.names[index] = value.output
        while True:
            current = self._settle(found, current)
            place = self._next_open(found)
            if place is None:
                break
            if self._runs >= MOST_RUNS:
                found.missing += [
                    i for i in range(len(self._values)) if i not in found.names and i not in found.missing
                ]
                break
            name = self._guess(found, current, place)
            if name is None:
                found.missing.append(place)
            else:
                found.names[place] = name
                current = self._run(found.names, repaired=True)
        if self._graph.repairs:
            current = self._run(found.names)
        found.local = {index: current[name] for index, name in found.names.items() if name in current}
        return found

    def _run(self, names: Mapping[int, str], *, repaired: bool = False) -> dict[str, Array]:
        self._check()
        self._runs += 1
        cuts = {}
        for index, name in names.items():
            like = self._last.get(name)
            if like is not None and name not in self._graph.outputs:
                cuts[name] = np.nan_to_num(self._values[index].array).astype(like.dtype).reshape(like.shape)
        result = self._graph.run(self._feeds, None, cuts, repaired=repaired)
        if not names:
            self._last = result
        return result

    def _settle(self, found: Matches, current: dict[str, Array]) -> dict[str, Array]:
        """Cut what is equal, until nothing more becomes equal; return the values of the last run."""
        while True:
            equal = self._equal(found, current)
            if not equal:
                return current
            found.names.update(equal)
            if len(found.names) == len(self._values) and self._graph.repairs:
                return current  # the last run, with the weights as they are, is still to come
            current = self._run(found.names, repaired=True)

    def _equal(self, found: Matches, current: Mapping[str, Array]) -> dict[int, str]:
        taken, equal = set(found.names.values()), dict[int, str]()
        candidates = self._by_size(name for name in current if name not in taken)
        for index, value in enumerate(self._values):
            if index in found.names or value.output:
                continue
            names = candidates.get(self._expected[index].size, [])
            errors = self._errors(index, names, current)
            good = [(name, error) for name, error in zip(names, errors, strict=True) if error < EQUAL]
            if not good:
                continue
            least = min(error for _, error in good)
            # copies of a value are equal: the first one is where it is computed
            name = next(name for name, error in good if error <= max(10 * least, 1e-6))
            if name not in equal.values():
                equal[index] = name
                if index in found.missing:
                    found.missing.remove(index)
        return equal

    def moved_behind(self, found: Matches, guilty: int) -> Matches | None:
        """Return the matches with the value before a divergent one moved behind nodes that change it.

        Where a graph changes the output of a module and then reads the changed value only, the block behind it looks
        guilty. With the changed value cut in its place, that block is right, and the module before it is not.

        Returns:
            With the local values of the new cuts; None if no such move makes the block behind it right.
        """
        block = self._graph.block(found.names[guilty], set(found.names.values()))
        sources = {source for node in block for source in node.input}
        for index in [index for index, source in found.names.items() if source in sources]:
            moved = self._placed(found, guilty, index, block)
            if moved is not None:
                return moved
        return None

    def refined(self, found: Matches, guilty: int) -> Matches | None:
        """Return the matches with the value before a divergent one found in its block, though it was missing there.

        It is the value which, cut, makes the divergent one right.
        """
        index = guilty - 1
        if index not in found.missing:
            return None
        block = self._graph.block(found.names[guilty], set(found.names.values()))
        placed = self._placed(found, guilty, index, block)
        if placed is not None:
            placed.missing = [other for other in placed.missing if other != index]
        return placed

    def _placed(self, found: Matches, guilty: int, index: int, block: Sequence[Any]) -> Matches | None:
        """Return the matches with a value in a block for which the block's own value is right; None without one."""
        name = found.names[guilty]
        inner = [output for node in block for output in node.output if output in found.inherited and output != name]
        names = self._by_size(inner).get(self._expected[index].size, [])
        current = self._run(found.names)
        scored = sorted(zip(self._errors(index, names, current), names, strict=True))
        for _, other in scored[: 2 * TRIED]:
            local = self._run({**found.names, index: other})
            error = relative_error(
                of_tokens(self._values[guilty].array, self._tokens), of_tokens(local[name], self._tokens)
            )
            if error < EQUAL / 10:
                moved = {**found.names, index: other}
                values = {place: local[value] for place, value in moved.items() if value in local}
                return Matches(moved, values, found.missing, found.inherited)
        return None

    def _by_size(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Return the names of values by the size of their part that belongs to tokens, in the order of the graph."""
        sizes: dict[int, list[str]] = {}
        for name in sorted(names, key=lambda name: self._graph.index.get(name, -1)):
            array = self._last.get(name)
            if array is not None and name in self._graph.index and name not in self._graph.outputs:
                sizes.setdefault(of_tokens(array, self._tokens).size, []).append(name)
        return sizes

    def _errors(self, index: int, names: Sequence[str], current: Mapping[str, Array]) -> list[float]:
        if current is not self._sampled:  # a value is sampled once a run
            self._sampled, self._samples = current, {}
        sample = sampled(self._expected[index])
        size = float(np.linalg.norm(sample)) or 1.0
        errors = []
        for name in names:
            actual = self._samples.get(name)
            if actual is None:
                actual = self._samples[name] = sampled(of_tokens(current[name], self._tokens))
            difference = sample - actual
            finite = np.isfinite(difference)
            errors.append(float(np.linalg.norm(difference[finite])) / size if finite.mean() > 0.1 else float("inf"))
        return errors

    def _next_open(self, found: Matches) -> int | None:
        """Return the first value that is neither found nor given up."""
        return next(
            (index for index in range(len(self._values)) if index not in found.names and index not in found.missing),
            None,
        )

    def _guess(self, found: Matches, current: Mapping[str, Array], index: int) -> str | None:
        """Return the value of the graph that stands for one that none is equal to; None if there is none."""
        taken = set(found.names.values())
        names = self._by_size(name for name in current if name not in taken).get(self._expected[index].size, [])
        module = self._values[index].module
        ranked = sorted(names, key=lambda name: self._rank(module, self._expected[index], current[name], name))
        best, most = None, 0
        for name in ranked[:TRIED]:
            if self._runs >= MOST_RUNS:
                break
            trial = Matches(names={**found.names, index: name}, missing=[])
            gain = len(self._equal(trial, self._run(trial.names, repaired=True)))
            gain -= len(self._equal(Matches(names=dict(found.names)), current))
            if gain > most:
                best, most = name, gain
        return best

    def _rank(self, module: str, expected: Any, actual: Array, name: str) -> tuple[bool, float]:
        """Return what candidates are sorted by: in the module's scope first, then by correlation."""
        own = self._scopes.get(name, "")
        inside = bool(module) and (own == module or own.endswith(f".{module}"))
        values = of_tokens(actual, self._tokens).ravel().astype(np.float64)
        finite = np.isfinite(values)
        if not finite.any():
            return not inside, 0.0
        left, right = expected.ravel()[finite], values[finite]
        scale = float(np.linalg.norm(left) * np.linalg.norm(right))
        return not inside, -abs(float(left @ right)) / scale if scale else 0.0


SCOPE_KEY = "pkg.torch.onnx.name_scopes"


def module_scopes(nodes: Sequence[Any]) -> dict[str, str]:
    """Return the path of the module that the exporter says a value belongs to, by the value's name.

    The dynamo exporter writes it into the metadata of a node, the TorchScript exporter into its name.
    """
    scopes = {}
    for node in nodes:
        listed = next((entry.value for entry in node.metadata_props if entry.key == SCOPE_KEY), None)
        if listed is not None:
            paths = re.findall(r"'([^']*)'", listed)
            path = paths[-2] if len(paths) > 1 else ""
        else:
            path = ".".join(node.name.strip("/").split("/")[:-1]) if node.name.startswith("/") else ""
        for name in node.output:
            scopes[name] = path
    return scopes
