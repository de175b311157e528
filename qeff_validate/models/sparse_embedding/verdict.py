# SPDX-License-Identifier: Apache-2.0
"""Compares sparse vectors: as vectors, by their strongest words, and by their dot products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import bounds_for, metric_bounds
from qeff_validate.comparison.metric import SPARSE_METRICS, Metric, names
from qeff_validate.comparison.sparse_metrics import dot_error, word_order, zero_rows
from qeff_validate.comparison.verdict import GateResult, Rows, Verdict, compare, finite_rows, rows_beyond, with_gates
from qeff_validate.models.padding_hint import padding_hint
from qeff_validate.protocols import ComparisonContext
from qeff_validate.tensors import Tensors


def judge_sparse(name: str, reference: Tensors, actual: Tensors, inputs: Any, context: ComparisonContext) -> Verdict:
    """Compare sparse vectors ``[rows, vocabulary]``; a row that is zeros in the reference must be zeros."""
    bounds = bounds_for(context.precision, floor=context.floor, override=context.override)
    rows = Rows(inputs.labels, zero_rows(reference[name]))
    verdict = compare(
        reference, actual, bounds, rows=rows, seed=context.seed, precision=context.precision,
        similarity=inputs.similarity,
    )  # fmt: skip
    if not verdict.metrics:
        return verdict  # outputs of another structure
    usable = finite_rows(reference[name]) & finite_rows(actual[name])
    usable[list(rows.tokenless)] = False
    places = np.flatnonzero(usable)
    results = []
    if places.size and "max_abs_rms" in bounds:
        wanted, got = reference[name][places], actual[name][places]
        why = "no word changes places across a gap that noise cannot close"
        own = metric_bounds(
            SPARSE_METRICS, "word_order", why, context.precision, override=context.override, floor=context.floor
        )
        noise = bounds["max_abs_rms"].noise
        for metric in (dot_error(wanted, got, seed=context.seed), *word_order(wanted, got, noise)):
            row = int(places[metric.worst["row"]])
            place = {**metric.worst, "row": row, "text": inputs.labels[row]}
            results.append(GateResult(Metric(f"{name}.{metric.name}", metric.value, place), own.get(metric.name)))
    verdict = with_gates(verdict, results, names(SPARSE_METRICS), floor=context.floor, precision=context.precision)
    if verdict.status != "fail":
        return verdict
    hint = padding_hint(
        rows_beyond(reference, actual, bounds, rows), context.padded, rows.with_tokens(), actual, context.precision
    )
    return replace(verdict, reason=f"{hint}; {verdict.reason}") if hint else verdict
