# SPDX-License-Identifier: Apache-2.0
"""Compares scores with the reference: their size, and the order of labels and of documents; noise leaves ties."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import (
    PRECISIONS,
    Bound,
    gate_bounds,
    missing_bounds_reason,
    overridden,
)
from qeff_validate.comparison.metric import (
    SCORE_METRICS,
    ErrorsByRow,
    Metric,
    least_bounds,
    most_bounds,
    table_bounds,
)
from qeff_validate.comparison.score_metrics import order_metrics, scale_of, score_errors
from qeff_validate.comparison.vector_metrics import worst_row
from qeff_validate.comparison.verdict import (
    GateResult,
    Rows,
    Verdict,
    finite_rows,
    non_finite,
    row_texts,
    structure_problem,
    verdict_of_gates,
    with_unusable_rows,
)
from qeff_validate.models.padding_hint import padding_hint
from qeff_validate.protocols import ComparisonContext
from qeff_validate.tensors import Tensors

GAP = 4.0
"""Two scores are tied if they differ by at most this multiple of the typical error of the worst score."""

ORDERS = ("document_order", "label_order")


def judge_scores(name: str, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
    """Compare scores ``[rows, labels]``.

    Args:
        name: of the output.
        reference: outputs of the original model.
        actual: outputs under test.
        inputs: the rows, with ``labels`` for messages and ``groups`` of documents that are ranked against each other.
        context: precision, floor, the case's bounds.
    """
    rows = Rows(inputs.labels)
    planned = len(rows.labels)
    problem = structure_problem(reference, actual, planned)
    if problem:
        return Verdict("fail", problem, planned=planned)
    wanted, got = reference[name], actual[name]
    usable, finite = finite_rows(wanted), finite_rows(got)
    results = non_finite(name, got, np.flatnonzero(usable & ~finite).tolist(), rows)
    places = np.flatnonzero(usable & finite)
    scale = scale_of(wanted[usable]) if usable.any() else 0.0
    bounds = _bounds(context, scale)
    if places.size and "score_error" in bounds:
        results += _gates(name, wanted[places], got[places], places.tolist(), bounds, inputs)
    verdict = verdict_of_gates(results, planned)
    texts = row_texts([(label, 1) for label in inputs.labels])
    verdict = replace(verdict, compared=int(usable.sum()), texts=texts)
    if "score_error" not in bounds:
        reason = missing_bounds_reason(["score_error"], context.floor, context.precision)
        verdict = replace(verdict, status="inconclusive" if verdict.status == "pass" else verdict.status, reason=reason)
    elif verdict.status == "pass" and places.size:
        verdict = _discriminating(verdict, float(np.ptp(wanted[places], axis=0).max()), bounds["score_error"])
    elif verdict.status == "fail":
        beyond = set(np.flatnonzero(~(score_errors(wanted, got) <= bounds["score_error"].value)).tolist())
        hint = padding_hint(beyond, context.padded, list(range(planned)), actual, context.precision)
        verdict = replace(verdict, reason="; ".join(filter(None, (hint, verdict.reason))))
    return with_unusable_rows(verdict, {name: np.flatnonzero(~usable).tolist()}, inputs.labels)


def _bounds(context: ComparisonContext, scale: float) -> dict[str, Bound]:
    """Return the bounds in the unit of the scores; those of the table are relative to their root mean square."""

    def scaled(values: dict[str, float]) -> dict[str, float]:
        return {name: value * scale for name, value in values.items()}

    table = {precision: scaled(table_bounds(SCORE_METRICS, precision)) for precision in PRECISIONS}
    least, most = scaled(least_bounds(SCORE_METRICS)), scaled(most_bounds(SCORE_METRICS))
    bounds = gate_bounds(context.precision, context.floor, table=table, least=least, most=most)
    bounds |= dict.fromkeys(ORDERS, Bound(0.0, "exact", "nothing changes places across a gap that noise cannot close"))
    return bounds | overridden(context.override)


def _gates(
    name: str, wanted: Any, got: Any, places: list[int], bounds: dict[str, Bound], inputs: Any
) -> list[GateResult]:
    noise = bounds["score_error"].noise
    groups = [inputs.groups[row] for row in places] if inputs.groups else []
    metrics = [
        worst_row("score_error", score_errors(wanted, got)),
        *order_metrics(wanted, got, groups, GAP * noise),
    ]
    results = []
    for metric in metrics:
        row = places[metric.worst["row"]]
        place = {**metric.worst, "row": row, "text": inputs.labels[row]}
        errors_by_row = metric.by_row and ErrorsByRow.of(metric.by_row.values, places, len(inputs.labels))
        placed = Metric(f"{name}.{metric.name}", metric.value, place, errors_by_row)
        results.append(GateResult(placed, bounds.get(metric.name)))
    return results


def _discriminating(verdict: Verdict, spread: float, bound: Bound) -> Verdict:
    """Return the verdict; inconclusive if the bound would accept the score of any row for any other."""
    if spread > 2 * bound.value:
        return verdict
    reason = (
        f"the scores of all rows are within {spread:.2g} of each other, and errors up to {bound.value:.2g} are allowed:"
        " these inputs cannot tell a right model from one that gives every row the same score"
    )
    return replace(verdict, status="inconclusive", reason=reason)
