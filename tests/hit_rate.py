# SPDX-License-Identifier: Apache-2.0
"""Measures how often an explanation is right: mutants whose place is known go through the whole pipeline.

The place of a mutant is read from what it changes: parameters, attributes, hooks and submodules of the original model,
or nodes and initializers of the graph, whose modules the exporter has written down. An explanation is counted only
where the verdict is `fail`.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qeff_validate.config.case import Artifacts, Case
from qeff_validate.errors import ValidateError
from qeff_validate.explain import context as context_module
from qeff_validate.explain.names import common_module
from qeff_validate.explain.summary import PEFT_PREFIX
from qeff_validate.mutation.mutant import (
    AdapterMutant,
    GraphMutant,
    Inapplicable,
    Mutant,
    PoolingMutant,
    SessionMutant,
    mutants,
)
from qeff_validate.pipeline.explanation import explained
from qeff_validate.protocols import Settings, model_kind, runtime
from qeff_validate.report.explanation import Explanation
from qeff_validate.sdk.locate import Sdk
from qeff_validate.selftest.equivalent_variants import VARIANTS, seeded
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.selftest.run import CaseUnderTest, InapplicableRecorder, changed_graph

KINDS: Sequence[tuple[str, str]] = (
    ("rotary base", "base"),
    ("dropped in one|one bias|bias is zero", "bias is zero|no bias"),
    ("last layer dropped|first layer skipped", "not in the graph|skipped"),
    ("layers swapped", "swapped|are those of"),
    ("attention left out|softmax gives zeros|largest weight is zero|neuron dead", "zero"),
    ("attention scale|scores of one", "scores scaled"),
    ("heads swapped", "permuted|swapped"),
    ("projections swapped|exchanged", "swapped|is that of"),
    ("transposed", "transposed"),
    ("epsilon", "epsilon"),
    ("without its weight", "everywhere|no weight"),
    ("one weight \\+ 0.01", "element"),
    ("GELU", "gelu"),
    ("ReLU", "relu instead"),
    ("clipped", "clipped"),
    ("garbage", "rows"),
    ("negated|sign of adapters", "negated"),
    ("x 1.02|x 1.01|x 0.5|x 2|x 4|alpha / r|adapters x", "scaled"),
    ("NaN", "NaN"),
    ("fp16", "fp16"),
    ("bf16", "bf16"),
    ("MXFP6", "MXFP6"),
    ("int8", "int8"),
    ("positions \\+ 1", "shifted|position"),
    (
        "pooled by|mask ignored in pooling|mean over|sum in place|mean without|pooling cut|pooled from",
        "pooled|mean|sum",
    ),
    ("served for|swapped$|another adapter", "that of"),
    ("without adapter", "zero|that of adapter 'base'"),
)
"""Mutants by a pattern of their name, and the words that a finding of the same kind has."""


# the graphs are this project's own: a process for each session would take most of the time
context_module.IsolatedRuntime = lambda direct, *_: direct  # type: ignore[assignment, misc]


@dataclass(frozen=True, slots=True)
class Hit:
    """One mutant that a verdict caught, and its explanation.

    Attributes:
        where: paths of the modules that it changes; empty: it is outside of the graph.
        stage: the right one.
        one: it sits in one place.
    """

    case: str
    runtime: str
    mutant: str
    level: str
    where: frozenset[str]
    stage: str
    one: bool
    explanation: Explanation | None
    note: str = ""

    @property
    def module_hit(self) -> bool:
        """True if the named module is a changed one, a part of one, or the one that owns it."""
        named = None if self.explanation is None else self.explanation.module
        if not self.where:
            return named is None
        return named is not None and any(
            named == path
            or named == common_module(sorted(self.where))
            or named.startswith(f"{path}.")
            or named == path.rpartition(".")[0]
            for path in self.where
        )

    @property
    def exact(self) -> bool:
        """True if the named module itself is a changed one."""
        return self.explanation is not None and self.explanation.module in self.where

    @property
    def kind_hit(self) -> bool:
        """True if the finding says what the mutant does."""
        finding = "" if self.explanation is None else self.explanation.finding
        words = next((words for name, words in KINDS if re.search(name, self.mutant)), None)
        return words is not None and re.search(words, finding) is not None

    @property
    def stage_hit(self) -> bool:
        """True if the named stage is the right one."""
        return self.explanation is not None and self.explanation.stage == self.stage


class HitRate:
    """Runs the mutants of one case.

    Args:
        case: healthy.
        pipeline: returns the pipeline of a case.
        folder: for graphs; those of module mutants are kept there.
        anonymous: strip all names and metadata from the graphs.
    """

    def __init__(self, case: Case, pipeline: Callable[[Case], Any], folder: Path, *, anonymous: bool = False) -> None:
        self._case, self._pipeline, self._folder, self._anonymous = case, pipeline, folder, anonymous
        self._tested = CaseUnderTest(case, pipeline, folder)
        self._healthy = pipeline(case)

    def hits(self, runtimes: Sequence[str], only: str = "") -> Iterator[Hit]:
        """Yield a hit for each mutant and runtime that the verdict catches."""
        for mutant in mutants(self._case.model):
            if re.search(only, mutant.name) is None:
                continue
            for name in runtimes:
                with suppress(_NotCaughtError, Inapplicable):
                    yield self._hit(mutant, name)

    def program_hits(self) -> Iterator[Hit]:
        """Yield a hit for each graph mutant that a compiler makes, of a graph that is right, on the simulated card."""
        for mutant in mutants(self._case.model):
            if not isinstance(mutant, GraphMutant):
                continue
            try:
                where = graph_places(onnx.load(str(self._healthy.onnx().path)), mutant)
            except Inapplicable:
                continue
            if len({_layer(place) for place in where}) > 1:
                continue  # it sits in several places
            script = str(Path(__file__).with_name("defective_compiler.py"))
            command = [sys.executable, script, self._case.model, mutant.name]
            with pytest.MonkeyPatch.context() as patch, suppress(_NotCaughtError):
                patch.setattr(Sdk, "compiler", lambda _, command=command: (command, False))
                patch.setattr(Sdk, "fingerprint", lambda _, name=mutant.name: {"defect": name})
                explanation, note = self._explained(self._pipeline(self._case), runtime("sim"))
                stage = "compiler and runtime"
                yield Hit(self._case.name, "sim", mutant.name, mutant.level, where, stage, True, explanation, note)

    def _hit(self, mutant: Mutant, name: str) -> Hit:
        if isinstance(mutant, AdapterMutant | SessionMutant):
            return self._in_session(mutant, name)
        path = self._graph(mutant)
        if isinstance(mutant, GraphMutant):
            where = graph_places(onnx.load(str(self._healthy.onnx().path)), mutant)
        elif isinstance(mutant, PoolingMutant):
            where = frozenset({"pooling"})
        else:
            where = self._module_places(mutant)
        case = self._case.model_copy(update={"artifacts": Artifacts(onnx=str(path))})
        explanation, note = self._explained(self._pipeline(case), runtime(name))
        one = len(where) == 1 or all(_layer(place) == _layer(next(iter(where))) for place in where)
        return Hit(self._case.name, name, mutant.name, mutant.level, where, "export", one, explanation, note)

    @staticmethod
    def _explained(pipeline: Any, on: Any) -> tuple[Explanation | None, str]:
        result = pipeline.result(on)
        if result.status != "fail" or not result.metrics:
            raise _NotCaughtError
        result = explained(pipeline, on, result, Settings(), 600.0)
        return result.explanation, next((text for text in result.findings if "not explained" in text), "")

    def _graph(self, mutant: Mutant) -> Path:
        """Return the graph with the mutant; exports take seconds, so they are kept."""
        name = re.sub("[^a-z0-9]+", "-", mutant.name.lower())
        folder = self._folder / self._case.name / f"{name}{'-anonymous' if self._anonymous else ''}"
        path = folder / "model.onnx"
        if (folder / "inapplicable").exists():
            raise _NotCaughtError
        if not path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            source = self._folder / self._case.name / name / "model.onnx"
            try:
                if isinstance(mutant, GraphMutant):
                    changed_graph(mutant, self._healthy.onnx(), path)
                elif self._anonymous and source.exists():
                    shutil.copy(source, path)
                else:
                    self._tested._exported(mutant, path)
            except ValidateError:
                (folder / "inapplicable").touch()
                raise _NotCaughtError from None
            model = onnx.load(str(path))
            del model.metadata_props[:]  # or it would be taken for an export of this library
            onnx.save(anonymous(model) if self._anonymous else model, str(path))
        return path

    def _module_places(self, mutant: Mutant) -> frozenset[str]:
        module = self._tested._torch.loaded()[0]
        root = getattr(module, "base_model", None) or module.model
        before = _snapshot(root)
        with mutant.applied_to(root):
            after = _snapshot(root)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        return frozenset(
            (path.rpartition(".")[0] if path.endswith(".base_layer") else path).removeprefix(PEFT_PREFIX)
            for path in changed
        )

    def _in_session(self, mutant: AdapterMutant | SessionMutant, name: str) -> Hit:
        fault: Callable[..., Any] = mutant.change
        where: frozenset[str] = frozenset()
        if model_kind(self._case).stateful:
            from qeff_validate.mutation.causal_lm_mutants import serving

            adapters = self._healthy.inputs().adapters
            fault = serving(mutant, adapters)
            if isinstance(mutant, AdapterMutant):
                where = _adapter_places(mutant, adapters)
        errors: list[Any] = []
        on = FaultyRuntime(lambda session: InapplicableRecorder(session, fault, errors), name)
        explanation, note = self._explained(self._pipeline(self._case), on)
        if errors:
            raise _NotCaughtError
        stage = "compiler and runtime" if name == "sim" else "runtime"
        one = len(where) <= 1
        return Hit(
            self._case.name,
            name,
            mutant.name,
            mutant.level,
            where if one else frozenset(),
            stage,
            one,
            explanation,
            note,
        )


class _NotCaughtError(Exception):
    """The verdict does not catch the mutant, or there is nothing to change."""


def _layer(path: str) -> str:
    """Return a path up to its last number: the layer."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else path


def _snapshot(root: Any) -> dict[str, Any]:
    """Return what each module has of its own: weights, numbers, hooks; members of lists by identity."""
    state: dict[str, Any] = {}
    for path, module in root.named_modules():
        tensors = {
            name: tensor.detach().double().numpy().tobytes()
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        values = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        parent = root.get_submodule(path.rpartition(".")[0]) if path else None
        identity = id(module) if type(parent).__name__ == "ModuleList" else 0
        state[path] = tensors, values, hooks, identity
    return state


def graph_places(model: Any, mutant: GraphMutant) -> frozenset[str]:
    """Return the modules whose nodes or initializers a mutant changes, by the metadata of the healthy graph."""
    healthy, faulty = model, onnx.ModelProto()
    faulty.CopyFrom(model)
    mutant.change(faulty)
    after = {node.output[0]: node for node in faulty.graph.node}
    changed = {t.name: t.SerializeToString() for t in healthy.graph.initializer}
    tensors = {t.name for t in faulty.graph.initializer if changed.get(t.name, b"") not in (b"", t.SerializeToString())}
    places = set()
    for node in healthy.graph.node:
        other = after.get(node.output[0])
        differs = other is None or (other.op_type, list(other.input)) != (node.op_type, list(node.input))
        differs = differs or list(map(str, other.attribute)) != list(map(str, node.attribute))
        if differs or tensors & set(node.input):
            places.add(_scope(node))
    return frozenset(places)


def _scope(node: Any) -> str:
    listed = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "[]")
    paths = re.findall(r"'([^']*)'", listed)
    path = paths[-2] if len(paths) > 1 else ""
    if not paths:  # the TorchScript exporter writes the path into the name
        path = ".".join(node.name.strip("/").split("/")[:-1]).removeprefix("module.")
    for prefix in ("module.model.", "base_model."):
        if path.startswith(prefix):
            path = path.removeprefix(prefix)
            break
    else:
        return "pooling" if path in ("", "base_model", "module") else path
    return path.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


def _adapter_places(mutant: AdapterMutant, adapters: Mapping[str, Any]) -> frozenset[str]:
    places = set()
    for name, tensors in adapters.items():
        try:
            served = mutant.change(name, adapters)
        except ValidateError:
            raise _NotCaughtError from None
        for key, array in served.items():
            if not np.array_equal(array, tensors[key]):
                places.add(re.sub(r"\.(lora|vera|ia3|oft|hada|lokr)_.*", "", key.removeprefix(PEFT_PREFIX)))
    return frozenset(places)


def anonymous(model: Any) -> Any:
    """Return a graph whose inner values and nodes are numbered, without metadata: nobody's exporter."""
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}

    def renamed(name: str) -> str:
        return name if not name or name in kept else names.setdefault(name, f"v{len(names)}")

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)

    def in_branches(node: Any) -> None:
        """Rename what the branches of a node read from outside."""
        for entry in node.attribute:
            for branch in [entry.g] if entry.HasField("g") else []:
                for inner in branch.node:
                    inner.input[:] = [names.get(name, name) for name in inner.input]
                    in_branches(inner)
                for value in branch.output:
                    value.name = names.get(value.name, value.name)

    for number, node in enumerate(graph.node):
        in_branches(node)
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.name = f"n{number}"
        node.doc_string = ""
        del node.metadata_props[:]
    del graph.value_info[:]
    return model


def healthy_explanations(
    case: Case, pipeline: Callable[[Case], Any], folder: Path, seed: int, names: Sequence[str] = ()
) -> Iterator[tuple[str, Explanation | None, str]]:
    """Yield the forced explanation of each legitimate variant that passes; it must name nothing."""
    for variant in VARIANTS:
        if case.model not in variant.kinds or (names and variant.name not in names):
            continue
        kept: list[Any] = []

        def make(changed: Case, kept: list[Any] = kept) -> Any:
            made = pipeline(changed)
            original = made.result

            def result(on: Any, made: Any = made, original: Any = original) -> Any:
                found = original(on)
                kept.append(explained(made, on, found, Settings(), 600.0) if found.metrics else found)
                return found

            made.result = result  # noqa: B023
            return made

        variant.run(make, seeded(case, seed), folder)
        for result in kept:
            note = next((text for text in result.findings if "not explained" in text), "")
            yield variant.name, result.explanation, note


def table(hits: Sequence[Hit]) -> list[str]:
    """Return lines of a Markdown table: hits by case and runtime."""
    lines = [
        "| case | runtime | caught | module | exactly | kind | stage | outside of the graph |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, name in dict.fromkeys((hit.case, hit.runtime) for hit in hits):
        group = [hit for hit in hits if (hit.case, hit.runtime) == (case, name)]
        placed = [hit for hit in group if hit.where]
        outside = [hit for hit in group if not hit.where]
        cells = [
            _share([hit.module_hit for hit in placed]),
            _share([hit.exact for hit in placed]),
            _share([hit.kind_hit for hit in placed]),
            _share([hit.stage_hit for hit in group]),
            _share([hit.module_hit and hit.stage_hit for hit in outside]),
        ]
        lines.append(f"| {case} | {name} | {len(group)} | {' | '.join(cells)} |")
    return lines


def _share(values: Sequence[bool]) -> str:
    return f"{sum(values)}/{len(values)} ({sum(values) / len(values):.0%})" if values else "none"


HEADING = "## Explanations"

LEGEND = (
    "Mutants that a verdict caught, each explained from the case and the outputs alone. *module*: the named module"
    " is one that the mutant changes, a part of it, or the one that owns it (of several, any); *exactly*: it is a"
    " changed one itself; *kind*: the finding"
    " says what was done; *stage*: of all caught mutants, with those outside of the graph; *outside*: of those, how"
    " many are told as such, with no module named. Module and graph mutants come as a user's file."
)


PARTS: Mapping[str, str] = {
    "named": "### Graphs and sessions",
    "unnamed": "### Graphs without names",
    "programs": "### Compiled programs",
    "healthy": "### Legitimate variants",
}
"""Parts of the section about explanations, and their headings."""


def found_text(part: str, hits: Sequence[Hit]) -> str:
    """Return a part of the section in docs/power.md, without its heading: a table, and what was wrong.

    Args:
        part: one of `PARTS`.
        hits: of graphs with names, of the same graphs without names and metadata, or of programs that a compiler makes
            wrongly, of graphs that are right.
    """
    searches = [hit.explanation.program for hit in hits if hit.explanation is not None]
    compilations = max((found.compilations for found in searches if found is not None), default=0)
    intro = {
        "named": "Faults of graphs as this project exports them, of adapters and of what a session is fed and gives.",
        "unnamed": "The same graphs with numbered values and nodes and without metadata, as from another exporter.",
        "programs": "Graphs that are right, compiled by a simulated compiler that has the fault of a graph mutant, in"
        f" each program that it makes; at most {compilations} compilations beside the case's own.",
    }[part]
    misses = [f"- {text}" for text in _misses(hits)]
    return "\n".join(
        [intro, "", *table(hits), "", *(["Wrong or incomplete:", "", *misses] if misses else ["None is wrong."])]
    )


def healthy_text(healthy: Sequence[tuple[str, str, Any]]) -> str:
    """Return the part about legitimate variants: case, variant and explanation of each."""
    accused = [name for _, name, found in healthy if found is not None and found.module is not None]
    cases = ", ".join(dict.fromkeys(case for case, _, _ in healthy))
    return f"Of {len(healthy)} legitimate variants ({cases}), explained by force, {len(accused)} name a module."


def _misses(hits: Sequence[Hit]) -> Iterator[str]:
    """Yield a sentence for each mutant whose module, stage or, in the graph, kind is not told."""
    for hit in hits:
        missed = [
            word
            for word, right in (
                ("module", hit.module_hit),
                ("stage", hit.stage_hit),
                ("kind", hit.kind_hit or not hit.where),
            )
            if not right
        ]
        if missed:
            said = "nothing" if hit.explanation is None else hit.explanation.summary
            yield f"{hit.case}, {hit.runtime}, {hit.mutant}: {', '.join(missed)}; it says: {said}"
