# SPDX-License-Identifier: Apache-2.0
"""Finds the values of the original model in a graph by their content, whatever the graph calls them.

Values before a fault are equal, so they are found at once. Each one that is found is cut, which gives the blocks behind
it the reference's inputs, so that values behind a fault are equal too in the next run. A value that stays different is
the output of the faulty block: of the values of its shape, the one that lets the most others be found stands for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qeff_validate.explain.arrays import in_files, of_tokens, relative_error, without_content
from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.names import is_within, numbered
from qeff_validate.explain.reference_values import ReferenceValue
from qeff_validate.explain.samples import Samples
from qeff_validate.tensors import Array, Tensors

EQUAL = 2e-3
"""Relative L2 below which a value of the graph is taken for one of the original model."""

CLEAR = EQUAL / 20
"""The same, if all values are below it: then no other one is just beyond `EQUAL`, and none can be found by cuts."""

TRIED = 4
"""Values of the graph that are tried for one value of the original model that none is equal to."""

MOST_RUNS = 16
"""Runs of the graph with cuts; each opens a session."""


@dataclass
class Matches:
    """Which value of a graph stands for which value of the original model.

    Attributes:
        names: of the graph, by the index of the reference value.
        local: the value where everything before it is the reference's, by the same index.
        missing: indices of the reference values that no value of the graph stands for.
        inherited: every value of the uncut graph; without content those that no reference value is as large as.
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
        self._last: dict[str, Array] = {}  # without content
        self._token_sizes: dict[str, int] = {}  # of values that may be matched, in the order of the graph
        self._greatest = 0.0  # error of a value that was taken for equal
        self._expected = [of_tokens(value.array, tokens) for value in values]
        self._sizes = {expected.size for expected in self._expected}
        self._scopes = module_scopes(graph.nodes)
        self._alike: dict[tuple[Any, ...] | None, list[int]] = {}  # the same value of each layer
        for index in range(len(values)):
            if self._in_its_layer(index) is not None:
                self._alike.setdefault(self._in_its_layer(index), []).append(index)
        self._sampled: Mapping[str, Array] = {}
        self._samples: dict[int, Samples] = {}  # of the last values, by their size

    def match(self) -> Matches:
        """Return the matches."""
        found = Matches()
        found.inherited = in_files(self._run({}))
        # with the right weights, values behind wrong ones are found at once; the names are the same
        current = self._run({}, repaired=True) if self._graph.repairs else dict(found.inherited)
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
                current.clear()  # values of one run at a time
                current = self._run(found.names, self._wanted(found), repaired=True)
        if self._graph.repairs:
            current.clear()
            current = self._run(found.names, found.names.values())
        found.local = {index: current[name] for index, name in found.names.items() if name in current}
        return found

    def _run(
        self, names: Mapping[int, str], wanted: Iterable[str] | None = None, *, repaired: bool = False
    ) -> dict[str, Array]:
        """Run the graph with the reference in place of some of its values; return those that are wanted, or all."""
        self._check()
        self._runs += 1
        self._sampled, self._samples = {}, {}  # they would keep the values of the run before
        cuts = {}
        for index, name in names.items():
            like = self._last.get(name)
            if like is not None and name not in self._graph.outputs:
                cuts[name] = np.nan_to_num(self._values[index].array).astype(like.dtype).reshape(like.shape)
        result = self._graph.run(self._feeds, None if wanted is None else list(wanted), cuts, repaired=repaired)
        if wanted is None:
            result = {name: self._if_wanted(array) for name, array in result.items()}
            self._last = {name: without_content(array) for name, array in result.items()}
            inner = (result.keys() & self._graph.index.keys()) - set(self._graph.outputs)
            ordered = sorted(inner, key=lambda name: self._graph.index[name])
            self._token_sizes = {name: of_tokens(self._last[name], self._tokens).size for name in ordered}
        return result

    def _if_wanted(self, array: Array) -> Array:
        """Return a value, without its content if no value of the original model is as large."""
        return array if of_tokens(without_content(array), self._tokens).size in self._sizes else without_content(array)

    def _wanted(self, found: Matches) -> list[str]:
        """Return the values that are found, and those that may stand for the ones that are not."""
        return [*found.names.values(), *self._candidates(found)]

    def _candidates(self, found: Matches) -> list[str]:
        """Return the values of the graph that may stand for those of the original model that are not found."""
        open_sizes = {expected.size for index, expected in enumerate(self._expected) if index not in found.names}
        names = self._by_size(self._last)
        return [name for size in open_sizes for name in names.get(size, ())]

    def _settle(self, found: Matches, current: dict[str, Array]) -> dict[str, Array]:
        """Cut what is equal, until nothing more becomes equal; return the values of the last run."""
        while True:
            equal = self._equal(found, current)
            if not equal:
                return current
            found.names.update(equal)
            found.missing += [index for index in self._passed(found) if index not in found.missing]
            complete = len(found.names) == len(self._values)
            complete = complete or (self._next_open(found) is None and self._greatest < CLEAR)
            if complete and self._graph.repairs:
                return current  # the last run, with the weights as they are, is still to come
            current.clear()
            current = self._run(found.names, found.names.values() if complete else self._wanted(found), repaired=True)
            if complete:
                return current

    def _passed(self, found: Matches) -> list[int]:
        """Return the values without an equal one in front of a layer most of whose values are found.

        The graph does not have them under their shape; nothing wrong passes through them, so none is looked for.
        """
        inner = {at: numbered(value.module) for at, value in enumerate(self._values) if not value.output}
        ends = {layer: at for at, layer in inner.items() if layer}
        counts = Counter(inner.values())
        right = Counter(layer for at, layer in inner.items() if at in found.names)
        passed = [at for at, layer in inner.items() if layer and 2 * right[layer] >= counts[layer]]
        passed += [at for at in inner if at in found.names and at > max(ends.values(), default=at)]  # behind the layers
        last = max(passed, default=-1)
        return [at for at, layer in inner.items() if at not in found.names and ends.get(layer, at) < last]

    def _equal(self, found: Matches, current: Mapping[str, Array]) -> dict[int, str]:
        taken, equal = set(found.names.values()), dict[int, str]()
        candidates = self._by_size(name for name in current if name not in taken)
        rows = dict[int, Any]()
        for index, value in enumerate(self._values):
            size = self._expected[index].size
            if index in found.names or value.output or size not in candidates:
                continue
            if size not in rows:
                rows[size] = self._samples_of(size, current).rows(candidates[size])
            errors = self._samples_of(size, current).errors(rows[size], self._expected[index], EQUAL)
            good = [(candidates[size][at], float(errors[at])) for at in np.flatnonzero(errors < EQUAL)]
            if not good:
                continue
            least = min(error for _, error in good)
            # copies of a value are equal: the first one is where it is computed
            name, error = next((name, error) for name, error in good if error <= max(10 * least, 1e-6))
            if name not in equal.values():
                equal[index] = name
                self._greatest = max(self._greatest, error)
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
        inner = {id(node) for node in block}
        for index in [index for index, source in found.names.items() if source in sources]:
            name = found.names[index]
            if any(name in node.input and id(node) not in inner for node in self._graph.nodes):
                continue  # the unchanged value is read too
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
        current = self._run(found.names, [*found.names.values(), *inner])
        samples = self._samples_of(self._expected[index].size, current) if names else None
        errors = [] if samples is None else samples.errors(samples.rows(names), self._expected[index]).tolist()
        scored = sorted(zip(errors, names, strict=True))
        for _, other in scored[: 2 * TRIED]:
            local = self._run({**found.names, index: other}, [*found.names.values(), other])
            error = relative_error(
                of_tokens(self._values[guilty].array, self._tokens), of_tokens(local[name], self._tokens)
            )
            if error < EQUAL / 10:
                moved = {**found.names, index: other}
                values = {place: local[value] for place, value in moved.items() if value in local}
                return Matches(moved, values, found.missing, found.inherited)
        return None

    def uncut(self, found: Matches, module: str) -> dict[int, Array]:
        """Return the values of a module, by index, where nothing in it is replaced, but everything before it."""
        inner = {index: name for index, name in found.names.items() if is_within(self._values[index].module, module)}
        if not inner:
            return {}
        before = {index: name for index, name in found.names.items() if index < min(inner)}
        values = self._run(before, [*before.values(), *inner.values()])
        return {index: values[name] for index, name in inner.items() if name in values}

    def _by_size(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Return the names of values by the size of their part that belongs to tokens, in the order of the graph."""
        sizes, wanted = dict[int, list[str]](), set(names)
        for name, size in self._token_sizes.items():
            if name in wanted:
                sizes.setdefault(size, []).append(name)
        return sizes

    def _samples_of(self, size: int, current: Mapping[str, Array]) -> Samples:
        """Return samples of those values of a run that have one size; a value is sampled once a run."""
        if current is not self._sampled:
            self._sampled, self._samples = current, {}
        if size not in self._samples:
            own = self._by_size(current).get(size, ())
            self._samples[size] = Samples({name: of_tokens(current[name], self._tokens) for name in own})
        return self._samples[size]

    def _next_open(self, found: Matches) -> int | None:
        """Return the first value that is neither found nor given up; give up those that no layer has."""
        for index in range(len(self._values)):
            if index in found.names or index in found.missing:
                continue
            alike = self._alike.get(self._in_its_layer(index), ())
            if not set(alike).isdisjoint(found.missing) and set(alike).isdisjoint(found.names):
                found.missing.append(index)  # one operator does the work of several modules
                continue
            return index
        return None

    def _in_its_layer(self, index: int) -> tuple[Any, ...] | None:
        """Return what a value is in its layer, whichever that is; None of one outside of the layers."""
        value = self._values[index]
        layer = numbered(value.module)
        return (value.module.removeprefix(layer), *value.place[1:3]) if layer and value.place is not None else None

    def _guess(self, found: Matches, current: Mapping[str, Array], index: int) -> str | None:
        """Return the value of the graph that stands for one that none is equal to; None if there is none."""
        taken = set(found.names.values())
        names = self._by_size(name for name in current if name not in taken).get(self._expected[index].size, [])
        ranked = sorted(names, key=lambda name: self._rank(found, index, current[name], name))
        equal = self._equal(Matches(names=dict(found.names)), current).values()
        best, most = None, 0
        for name in ranked[:TRIED]:
            gain = self._gain({**found.names, index: name}, name, equal)
            if gain > most:
                best, most = name, gain
        if best is None:  # the first that are computed behind the values before it may be like others, such as sums
            last = max((self._graph.index[name] for at, name in found.names.items() if at < index), default=-1)
            behind = [name for name in names if self._graph.index[name] > last and name not in ranked[:TRIED]]
            gains = ((self._gain({**found.names, index: name}, name, equal), name) for name in behind[: TRIED // 2])
            best = next((name for gain, name in gains if gain > 0), None)
        if best is None and index - 1 in found.names:  # the graph may go on with the module's input: it is left out
            name = found.names[index - 1]
            instead = {other: value for other, value in found.names.items() if other != index - 1} | {index: name}
            if name not in self._graph.outputs and self._gain(instead, name, equal) > 0:
                found.names = instead
                found.missing.append(index - 1)
                return name
        return best

    def _gain(self, names: dict[int, str], cut: str, equal: Iterable[str]) -> int:
        """Return how many values become equal with some values cut; 0 if that cannot be tried.

        Args:
            names: of the values that are cut, by index.
            cut: the new one; only values behind it can become equal, so no others are read.
            equal: values that are equal without it.
        """
        if self._runs >= MOST_RUNS or any(self._unlike(index, name) for index, name in names.items()):
            return 0
        trial, order = Matches(names=names), self._graph.index
        behind = [name for name in self._candidates(trial) if order[name] > order[cut]]
        before = sum(order[name] > order[cut] for name in equal)
        return len(self._equal(trial, self._run(names, behind, repaired=True))) - before

    def _unlike(self, index: int, name: str) -> bool:
        """Return whether a value of the graph has another number of elements than one of the original model."""
        like = self._last.get(name)
        return like is not None and like.size != self._values[index].array.size

    def _rank(self, found: Matches, index: int, actual: Array, name: str) -> tuple[bool, bool, bool, float]:
        """Return what candidates are sorted by.

        Those in the module's scope are first, then those that are computed from the value before alone, then those that
        are zero or not finite, which are like nothing; then by correlation.
        """
        module, before = self._values[index].module, found.names.get(index - 1)
        own = self._scopes.get(name, "")
        inside = bool(module) and (own == module or own.endswith(f".{module}"))
        stops = set(found.names.values())
        block = [node for node in self._graph.block(name, stops) if node.op_type != "Shape"]
        sources = {source for node in block for source in node.input} & stops
        expected, values = self._expected[index], of_tokens(actual, self._tokens).ravel().astype(np.float64)
        finite = np.isfinite(values)
        left, right = expected.ravel()[finite], values[finite]
        scale = float(np.linalg.norm(left) * np.linalg.norm(right))
        correlation = abs(float(left @ right)) / scale if scale else 0.0
        return not inside, sources != {before}, bool(finite.all() and right.any()), -correlation


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
