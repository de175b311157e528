# SPDX-License-Identifier: Apache-2.0
"""Compares the vectors of tokens, and the MaxSim scores and orders that follow from them."""

from __future__ import annotations

from typing import Any

from qeff_validate.comparison.bounds import bounds_for, metric_bounds
from qeff_validate.comparison.maxsim_metrics import Texts, maxsim_metrics
from qeff_validate.comparison.metric import MAXSIM_METRICS, Metric, names
from qeff_validate.comparison.verdict import GateResult, Rows, Verdict, compare, finite_rows, with_gates
from qeff_validate.protocols import ComparisonContext
from qeff_validate.tensors import Tensors


def judge_multi_vector(
    name: str, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext
) -> Verdict:
    """Compare vectors ``[vectors, dim]``, and the scores of all documents for each query.

    Args:
        name: of the output.
        reference: outputs of the original model.
        actual: outputs under test.
        inputs: `token_rows.TokenRows`; its groups tell queries from documents.
        context: precision, floor, the case's bounds.
    """
    bounds = bounds_for(context.precision, floor=context.floor, override=context.override)
    rows = Rows(inputs.labels)
    verdict = compare(reference, actual, bounds, rows=rows, seed=context.seed, precision=context.precision)
    usable = bool(verdict.metrics) and bool((finite_rows(reference[name]) & finite_rows(actual[name])).all())
    if not usable or "rel_l2" not in bounds:
        return verdict  # another structure, or vectors that are not finite: no score can be computed
    noise = bounds["rel_l2"].noise
    why = "no document changes places across a gap that noise cannot close"
    own = metric_bounds(
        MAXSIM_METRICS, "document_order", why, context.precision, override=context.override, floor=context.floor
    )
    results = []
    for metric in maxsim_metrics(reference[name], actual[name], Texts.of(inputs.scored, inputs.groups), noise):
        place = {**metric.worst, "text": inputs.texts[metric.worst["row"]]}
        results.append(GateResult(Metric(f"{name}.{metric.name}", metric.value, place), own.get(metric.name)))
    return with_gates(verdict, results, names(MAXSIM_METRICS), floor=context.floor, precision=context.precision)
