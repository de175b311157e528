# SPDX-License-Identifier: Apache-2.0
"""A base class for model kinds whose inputs are arrays with one row per example. Numpy only.

It is optional: the engine needs only `protocols.Model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from sys import modules
from typing import Any, ClassVar

import numpy as np

from qeff_validate.artifact import digest_file
from qeff_validate.comparison.bounds import Bound, bounds_for, overridden
from qeff_validate.comparison.metric import MetricSpec, names, table_bounds
from qeff_validate.comparison.vector_metrics import Floats, worst_row
from qeff_validate.comparison.verdict import GateResult, Rows, Verdict, compare, with_gates
from qeff_validate.config.case import Case
from qeff_validate.errors import IncomparableError
from qeff_validate.protocols import ComparisonContext, Graph, Session, Workload
from qeff_validate.tensors import Tensors


@dataclass(frozen=True)
class ArrayRows:
    """Inputs by name, ``[n, …]`` each, with one label per row."""

    arrays: Tensors
    labels: Sequence[str]
    tokenless: frozenset[int] = frozenset()
    notes: Sequence[str] = field(default=())


class RowModel:
    """Defaults of `protocols.Model`; a kind gives ``graph``, ``arrays``, ``module`` and ``reference``.

    Args:
        case: the case; its precision decides the bounds of compiled programs.
        options: the validated options of the kind.
        given: a module in memory instead of the case's source, or None.
        tokenizer: the tokenizer of ``given``, or None.
    """

    metrics: ClassVar[tuple[MetricSpec, ...]] = ()
    """The kind's own metrics; `own_errors` returns their errors."""

    graph: Graph

    def __init__(self, case: Case, options: Any, given: Any = None, tokenizer: Any = None) -> None:
        self.case, self.options, self.given, self.tokenizer = case, options, given, tokenizer

    def arrays(self) -> Tensors:
        """Return the inputs by name, ``[n, …]`` each."""
        raise NotImplementedError

    def module(self) -> tuple[Any, Tensors]:
        """Return the torch module to export, in eval mode, and example inputs."""
        raise NotImplementedError

    def reference(self, inputs: Any, *, dtype: str) -> Tensors:
        """Return the original model's outputs by name, ``[n, d]`` each, in ``float32`` or ``float64``."""
        raise NotImplementedError

    def own_errors(self, reference: Tensors, actual: Tensors) -> Mapping[str, Floats]:  # noqa: ARG002
        """Return the errors of the kind's own metrics, one number for each row, float64 ``[n]``; none by default."""
        return {}

    def fingerprint(self) -> Mapping[str, Any]:
        """Return source, config and options, and a digest of the file that defines the kind."""
        source = Path(str(modules[type(self).__module__].__file__))
        config = self.case.model_dump(mode="json", include={"source", "config"})
        return {**config, "options": self.options.model_dump(mode="json"), "code": digest_file(source)}

    def inputs_key(self) -> Mapping[str, Any]:
        """Return the fingerprint and the case's inputs."""
        return {**self.fingerprint(), "inputs": self.case.inputs.model_dump(mode="json"), "seed": self.case.seed}

    def tokenize(self) -> Tensors:
        """Return the inputs as they are stored."""
        return self.arrays()

    def inputs(self, stored: Tensors) -> ArrayRows:
        """Return the rows, numbered."""
        count = len(next(iter(stored.values())))
        return ArrayRows(stored, [f"row {row}" for row in range(count)])

    def interface(self, inputs: Any) -> Graph:  # noqa: ARG002
        """Return ``graph``."""
        return self.graph

    def infer(self, session: Session, inputs: Any, reference: Tensors) -> Tensors:  # noqa: ARG002
        """Run all rows in batches of the first bucket's size; the last is filled up with copies of its last row."""
        batch = next(iter(self.graph.buckets[0].values()))
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        outputs: dict[str, list[Any]] = {}
        for start in range(0, len(inputs.labels), batch):
            rows = np.minimum(np.arange(start, start + batch), len(inputs.labels) - 1)
            feeds = {name: inputs.arrays[name][rows].astype(dtype, copy=False) for name, dtype in dtypes.items()}
            for name, array in session.run(feeds).items():
                outputs.setdefault(name, []).append(array[: len(inputs.labels) - start])
        return {name: np.concatenate(parts) for name, parts in outputs.items()}

    def workloads(self, session: Session, inputs: Any) -> Sequence[Workload]:
        """Return one batch of the first rows, of the first bucket's size, as ``latency``."""
        batch = next(iter(self.graph.buckets[0].values()))
        rows = np.arange(batch) % len(inputs.labels)
        feeds = {spec.name: inputs.arrays[spec.name][rows].astype(spec.dtype, copy=False) for spec in session.inputs}
        return [Workload(f"batch {batch}", "latency", (feeds,), rows=batch)]

    def judge(self, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
        """Compare outputs as vectors, and each of the kind's own metrics with its bound; the worst row decides."""
        own_names = names(self.metrics)
        own_bounds = {
            name: Bound(value, "fallback", f"{context.precision} profile")
            for name, value in table_bounds(self.metrics, context.precision).items()
        }
        own_bounds |= {name: bound for name, bound in overridden(context.override).items() if name in own_names}
        override = {name: value for name, value in context.override.items() if name not in own_names}
        bounds = bounds_for(context.precision, override=override)
        rows = Rows(inputs.labels)
        verdict = compare(reference, actual, bounds, rows=rows, seed=context.seed, precision=context.precision)
        if not verdict.metrics:
            return verdict  # outputs of another structure
        results = []
        for name, errors in self.own_errors(reference, actual).items():
            metric = worst_row(name, errors)
            row = int(metric.worst["row"])
            labelled_metric = replace(metric, worst={**metric.worst, "text": inputs.labels[row]})
            results.append(GateResult(labelled_metric, own_bounds.get(name)))
        return with_gates(verdict, results, own_names, precision=context.precision)

    def relate(self, name: str, session: Session, inputs: Any, context: ComparisonContext) -> Verdict:  # noqa: ARG002
        """Refuse: the kind declares no relations.

        Raises:
            IncomparableError: always.
        """
        raise IncomparableError(f"the model kind {self.case.model!r} has no relation {name!r}")
