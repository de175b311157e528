# SPDX-License-Identifier: Apache-2.0
"""A model kind of qeff_validate, scorers of feature vectors, with a metric of their own (docs/how-to/model-kind.md)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qeff_validate.comparison.bounds import bounds_for
from qeff_validate.comparison.metric import VECTOR_METRICS, MetricSpec
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import Rows, Verdict, compare
from qeff_validate.config.strict import Strict
from qeff_validate.models.row_model import RowModel
from qeff_validate.mutation.mutant import ModuleMutant, Patch
from qeff_validate.protocols import ComparisonContext, Graph, ModelKind, Session
from qeff_validate.report.report import Report
from qeff_validate.tensors import Tensors, TensorSpec

FEATURES, CLASSES = 16, 8


MARGIN = MetricSpec("margin", "|Δ (best score − next score)|", 1.0, {"fp32": 1e-4, "fp16": 2e-2})


class ScorerOptions(Strict):
    """Options of the kind ``scorer``."""

    rows: int = 12
    batch_size: int = 4


class Scorer(RowModel):
    """Two linear layers with a GELU between them; rows are drawn from the case's seed."""

    metrics: ClassVar = (MARGIN,)

    @property
    def graph(self) -> Graph:
        """Features in, scores out."""
        inputs = (TensorSpec("features", "float32", ("batch_size", FEATURES)),)
        outputs = (TensorSpec("scores", "float32", ("batch_size", CLASSES)),)
        return Graph(inputs, outputs, ({"batch_size": self.options.batch_size},))

    def arrays(self) -> Tensors:
        """Draw the features."""
        rng = np.random.default_rng(self.case.seed)
        return {"features": rng.standard_normal((self.options.rows, FEATURES)).astype(np.float32)}

    def module(self) -> tuple[Any, Tensors]:
        """Build the module with seeded weights."""
        import torch
        from torch import nn

        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Linear(FEATURES, 32), nn.GELU(), nn.Linear(32, CLASSES)).eval()

        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = layers

            def forward(self, features: Any) -> Any:
                return self.layers(features)

        return Named().eval(), {name: array[:2] for name, array in self.arrays().items()}

    def reference(self, inputs: Any, *, dtype: str) -> Tensors:
        """Run the module in PyTorch."""
        import torch

        module = copy.deepcopy(self.module()[0]).to(getattr(torch, dtype))
        with torch.inference_mode():
            scores = module(torch.from_numpy(inputs.arrays["features"]).to(getattr(torch, dtype)))
        return {"scores": scores.numpy()}

    def own_errors(self, reference: Tensors, actual: Tensors) -> Mapping[str, Floats]:
        """Return how far the distance between the best score and the next one is off."""
        best = [np.sort(each["scores"].astype(np.float64), axis=1) for each in (reference, actual)]
        margins = [scores[:, -1] - scores[:, -2] for scores in best]
        return {"margin": np.abs(margins[1] - margins[0])}

    def relate(self, name: str, session: Session, inputs: Any, context: ComparisonContext) -> Verdict:
        """Run the rows in the opposite order: each must get the same scores."""
        turned = type(inputs)({key: array[::-1] for key, array in inputs.arrays.items()}, inputs.labels)
        forth, back = self.infer(session, inputs, {}), self.infer(session, turned, {})
        back = {key: array[::-1] for key, array in back.items()}
        return compare(forth, back, bounds_for(context.precision, override={}), rows=Rows(inputs.labels), relation=True)


def _negate_last_layer(model: Any, patch: Patch) -> None:
    weight = model.layers[-1].weight
    patch.tensor(weight, -weight)


MUTANTS = (ModuleMutant("last layer negated", "weights", _negate_last_layer, "none"),)

SCORER = ModelKind(
    options=ScorerOptions,
    create=Scorer,
    suite="scorer",
    metrics=(*VECTOR_METRICS, MARGIN),
    relations=("opposite_order",),
    mutants=("scorer_kind:MUTANTS",),
    quantities=("latency",),
)


def csv_report(report: Report) -> str:
    """Return a report as CSV: case, runtime, status."""
    rows = [f"{result.case},{result.runtime},{result.status}" for result in report.results]
    return "\n".join(["case,runtime,status", *rows]) + "\n"
