# SPDX-License-Identifier: Apache-2.0
"""What fp16 does to each value of a graph: overflow, values that become zero, and the error of rounding.

The graph runs in float32 over all inputs of a case. Constants beyond the range are clipped first, as they are before a
graph is compiled in fp16 (card-contract §7), so that a mask of -3.4e38 is no overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from qeff_validate.explain.graph_values import REAL, GraphValues
from qeff_validate.explain.matching import module_scopes
from qeff_validate.files import temporary_folder
from qeff_validate.protocols import Runtime, Session
from qeff_validate.runtimes.renamed_session import RenamedSession
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Array, Tensors

FP16_MAX = 65504.0
"""The greatest number in fp16."""

MOST_BYTES = 128 << 20
"""Bytes of values that are read from one run; a graph with more runs several times on the same inputs."""

FIRST_VALUES = 32
"""Values that are read from one run before their sizes are known."""


@dataclass(slots=True)
class RangeStatistics:
    """What fp16 does to a value, over all arrays that were added. Elements that are not finite are left out.

    Attributes:
        greatest: magnitude of an element.
        nonzero: elements that are not zero.
        zeroed: those of them that become zero in fp16, which are at most 2^-25 in magnitude.
        overflows: elements that become infinite in fp16, which are at least 65,520 in magnitude.
    """

    greatest: float = 0.0
    nonzero: int = 0
    zeroed: int = 0
    overflows: int = 0
    _squared_error: float = 0.0
    _squared_norm: float = 0.0

    def add(self, array: Array) -> None:
        """Add the elements of a float array of any shape."""
        exact = array[np.isfinite(array)].astype(np.float64)
        if not exact.size:
            return
        with np.errstate(over="ignore"):
            rounded = exact.astype(np.float16).astype(np.float64)
        self.greatest = max(self.greatest, float(np.abs(exact).max()))
        self.nonzero += int(np.count_nonzero(exact))
        self.zeroed += int(np.count_nonzero((exact != 0) & (rounded == 0)))
        self.overflows += int(np.isinf(rounded).sum())
        self._squared_error += float(np.sum((rounded - exact) ** 2))
        self._squared_norm += float(np.sum(exact**2))

    @property
    def zeroed_share(self) -> float:
        """Share of the non-zero elements that become zero."""
        return self.zeroed / self.nonzero if self.nonzero else 0.0

    @property
    def error(self) -> float:
        """Relative L2 of the rounding; infinite if an element overflows."""
        return float(np.sqrt(self._squared_error / self._squared_norm)) if self._squared_norm else 0.0


@dataclass(frozen=True, slots=True)
class NodeRange:
    """A node of a graph, and what fp16 does to its outputs.

    Attributes:
        output: name of its first output, by which the compiler's node precision file names it (card-contract §6.4).
        operator: its type, such as ``MatMul``.
        module: path of the module of the original model, where the exporter has written it down; else empty.
        greatest: magnitude, over all inputs.
        zeroed_share: share of the non-zero elements that become zero.
        error: relative L2 of the rounding of the outputs; infinite if an element overflows.
        overflows: elements that become infinite.
        reads: first outputs of the nodes whose outputs it reads.
        reads_clipped: whether it reads a constant beyond the range.
    """

    output: str
    operator: str
    module: str
    greatest: float
    zeroed_share: float
    error: float
    overflows: int
    reads: tuple[str, ...]
    reads_clipped: bool

    def to_plain(self) -> dict[str, Any]:
        """Return the node as plain data, for JSON."""
        return {
            "output": self.output,
            "operator": self.operator,
            "module": self.module,
            "greatest": self.greatest,
            "zeroed_share": self.zeroed_share,
            "error": self.error,
            "overflows": self.overflows,
            "reads_clipped": self.reads_clipped,
        }


class AuditedSession(SessionWrapper):
    """A session that keeps statistics of further outputs of its graph, and shows its user only the original ones.

    Args:
        session: on a graph with the values as further outputs.
        original: names of the original outputs.
        values: names of the outputs that statistics are kept of; original ones may be among them.
    """

    def __init__(self, session: Session, original: Sequence[str], values: Sequence[str]) -> None:
        super().__init__(session)
        self.outputs = tuple(spec for spec in session.outputs if spec.name in set(original))
        self.statistics = {name: RangeStatistics() for name in values}
        self._bytes: dict[str, int] = {}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once for the original outputs, and once for each group of values; errors are those of the session."""
        for group in self._groups():
            for name, array in self.session.run(feeds, fetch=group).items():
                self._bytes[name] = array.nbytes
                self.statistics[name].add(array)
        return self.session.run(feeds, fetch=[spec.name for spec in self.outputs] if fetch is None else fetch)

    def _groups(self) -> Iterator[list[str]]:
        """Yield the values in groups of at most `MOST_BYTES`, as far as sizes are known from the last run."""
        group: list[str] = []
        size = 0
        for name in self.statistics:
            own = self._bytes.get(name, MOST_BYTES // FIRST_VALUES)
            if group and size + own > MOST_BYTES:
                yield group
                group, size = [], 0
            group.append(name)
            size += own
        if group:
            yield group


@dataclass(frozen=True, slots=True)
class RangeAudit:
    """The nodes of a graph that compute real numbers.

    Attributes:
        nodes: in the order of the graph.
    """

    nodes: tuple[NodeRange, ...]

    def worst(self, count: int) -> list[NodeRange]:
        """Return the nodes with the greatest error, overflows first, the greatest magnitude before others."""
        return sorted(self.nodes, key=lambda node: (-min(node.overflows, 1), -_finite(node.error), -node.greatest))[
            :count
        ]

    def overflowing(self) -> list[NodeRange]:
        """Return the nodes with an output beyond the range, in the order of the graph."""
        return [node for node in self.nodes if node.overflows]

    def out_of_range(self) -> list[str]:
        """Return the first outputs of the nodes that overflow and of those that read them, in the order of the graph.

        A node in fp16 reads a rounded value, so a value beyond the range needs float32 on both of its sides.
        """
        beyond = {node.output for node in self.overflowing()}
        return [node.output for node in self.nodes if node.output in beyond or beyond.intersection(node.reads)]


def _finite(error: float) -> float:
    return error if np.isfinite(error) else 0.0


def audit_ranges(pipeline: Any, ort: Runtime) -> RangeAudit:
    """Run the ONNX graph of a case over all of its inputs, and return what fp16 does to the values of each node.

    Args:
        pipeline: of the case (`pipeline.case_pipeline.Pipeline`).
        ort: opens ONNX files; without optimization, so that the nodes are those of the file.

    Raises:
        ValidateError: the graph could not be built or run.
    """
    artifact = pipeline.onnx()
    case = pipeline.case
    model, inputs = pipeline.model(), pipeline.inputs()
    with temporary_folder() as folder:
        buckets = artifact.buckets
        graph = GraphValues(Path(artifact.path), folder, ort.open, untrusted=artifact.untrusted, buckets=buckets)
        clipped = clip_constants(graph)
        values = list(graph.index)
        with graph.opened(values, repaired=True) as session:
            floats = {spec.name for spec in session.outputs if spec.dtype in REAL}
            audited = AuditedSession(session, graph.outputs, [name for name in values if name in floats])
            mapped = case.artifacts.onnx is not None
            model.infer(
                RenamedSession(audited, pipeline.graph(), case.artifacts) if mapped else audited,
                inputs,
                pipeline.reference(),
            )
        return RangeAudit(tuple(node_ranges(graph, audited.statistics, clipped)))


def clip_constants(graph: GraphValues) -> set[str]:
    """Clip the constants of a graph to the range of fp16, and return the names of those that change."""
    beyond = {
        name: np.clip(array, -FP16_MAX, FP16_MAX)
        for name, array in graph.weights.items()
        if array.dtype.kind == "f" and array.size and np.abs(array).max() > FP16_MAX
    }
    graph.repairs.update(beyond)
    for node in graph.nodes:
        if node.op_type != "ConstantOfShape":
            continue
        for attribute in node.attribute:
            value = numpy_helper.to_array(attribute.t)
            if value.dtype.kind == "f" and np.abs(value).max() > FP16_MAX:
                attribute.t.CopyFrom(numpy_helper.from_array(np.clip(value, -FP16_MAX, FP16_MAX)))
    return set(beyond)


def node_ranges(
    graph: GraphValues, statistics: Mapping[str, RangeStatistics], clipped: set[str]
) -> Iterator[NodeRange]:
    """Yield the nodes with real outputs, in the order of the graph; of several outputs the worst counts.

    Args:
        graph: the graph.
        statistics: by the names of values.
        clipped: names of constants beyond the range.
    """
    scopes = module_scopes(graph.nodes)
    for node in graph.nodes:
        outputs = [name for name in node.output if name in statistics]
        if not outputs or node.op_type == "ConstantOfShape":
            continue
        found = [statistics[name] for name in outputs]
        reads = [graph.nodes[graph.index[name]].output[0] for name in node.input if name in graph.index]
        yield NodeRange(
            output=node.output[0],
            operator=node.op_type,
            module=scopes.get(outputs[0], ""),
            greatest=max(item.greatest for item in found),
            zeroed_share=max(item.zeroed_share for item in found),
            error=max(item.error for item in found),
            overflows=sum(item.overflows for item in found),
            reads=tuple(reads),
            reads_clipped=bool(clipped.intersection(node.input)),
        )
